#include "checkpoint/hdf5_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <numeric>
#include <thread>
#include <vector>

#include "checkpoint/file_io.h"
#include "core/base/build_config.h"
#include "core/base/error.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

TEST(Hdf5, GapsAreWhatIsLeft) {
  const std::vector<Extent> gaps = Gaps({{50, 10}, {7, 0}, {10, 20}, {30, 5}}, 70);
  std::vector<std::pair<int64_t, int64_t>> got;
  for (const Extent& g : gaps) got.emplace_back(g.at, g.bytes);
  EXPECT_EQ(got, (std::vector<std::pair<int64_t, int64_t>>{{0, 10}, {35, 15}, {60, 10}}));
}

// The library finds what was written where it said, without having written it.
TEST(Hdf5, ReadsWhatPlainWritesPutThere) {
  if (!kHaveHdf5) GTEST_SKIP() << "this build has no HDF5";
  std::vector<Hdf5Array> arrays;
  for (int i = 0; i < 40; ++i)
    arrays.push_back({fmt::format("group-{}/array-{}", i % 3, i), DType::kF64, {i % 5 * 7000}});
  const Hdf5Layout layout = LayOutHdf5(arrays);
  const std::string path = fs::temp_directory_path() / fmt::format("shoal_hdf5_{}.h5", getpid());
  fs::remove(path);
  std::vector<Extent> extents;
  std::vector<std::vector<double>> values;
  {
    File file = File::Create(path);
    for (size_t i = 0; i < arrays.size(); ++i) {
      extents.push_back({layout.offsets[i], arrays[i].bytes()});
      values.emplace_back(static_cast<size_t>(arrays[i].shape.numel()));
      std::iota(values[i].begin(), values[i].end(), static_cast<double>(1000 * i));
      file.Write(values[i].data(), arrays[i].bytes(), layout.offsets[i], {});
      // Large ones can be written past the system's cache.
      if (arrays[i].bytes() >= 1 << 16) {
        EXPECT_EQ(layout.offsets[i] % 4096, 0) << i;
      }
    }
    const char* frame = layout.frame.data();
    for (const Extent& gap : Gaps(extents, layout.size)) {
      file.Write(frame, gap.bytes, gap.at, {});
      frame += gap.bytes;
    }
    EXPECT_EQ(frame, layout.frame.data() + layout.frame.size());
  }
  EXPECT_EQ(static_cast<int64_t>(fs::file_size(path)), layout.size);
  for (size_t i = 0; i < arrays.size(); ++i) {
    std::vector<double> got(values[i].size());
    ReadHdf5(path, arrays[i], got.data());
    EXPECT_TRUE(got == values[i]) << arrays[i].name;
  }
  double none = 0;
  EXPECT_THROW(ReadHdf5(path, {"group-0/array-1", DType::kF64, {1}}, &none), Error);
  EXPECT_THROW(ReadHdf5(path, {"group-1/array-1", DType::kF64, {1}}, &none), Error);
  fs::resize_file(path, 1000);
  EXPECT_THROW(ReadHdf5(path, arrays[1], values[1].data()), Error);
  fs::remove(path);
  EXPECT_THROW(LayOutHdf5({arrays[1], arrays[1]}), Error);
  // No time is in it.
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  EXPECT_TRUE(LayOutHdf5(arrays).frame == layout.frame);
}

}  // namespace
}  // namespace shoal
