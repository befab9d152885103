#include "checkpoint/hdf5_file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "core/base/build_config.h"
#include "core/base/error.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

class Hdf5FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!kHaveHdf5) GTEST_SKIP() << "this build has no HDF5";
    path_ = fs::temp_directory_path() / fmt::format("shoal_hdf5_{}.h5", getpid());
    fs::remove(path_);
  }
  void TearDown() override { fs::remove(path_); }

  static void WriteArrays(const std::string& path) {
    Hdf5File file = Hdf5File::Create(path);
    const std::vector<double> values(700, 3.0);
    for (int i = 0; i < 20; ++i)
      file.Write(fmt::format("group-{}/array-{}", i % 3, i), DType::kF64, {700}, values.data());
    file.Close();
  }

  std::string path_;
};

// Wherever the disk is full: an error that says so, and a process that ends in order. Each limit
// needs a process, because the library cannot go on after it.
TEST_F(Hdf5FileTest, FullDiskAtAnyByte) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto limited = [&](rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {bytes, bytes};
    setrlimit(RLIMIT_FSIZE, &limit);
    try {
      WriteArrays(path_);
    } catch (const Error& e) {
      const bool told = e.kind() == ErrorKind::kStorage && e.message().find(path_) == 0 &&
                        e.message().find("no space left") != std::string::npos;
      fs::remove(path_);
      std::exit(told ? 3 : 4);
    }
    fs::remove(path_);
    std::exit(0);
  };
  WriteArrays(path_);
  const auto size = static_cast<rlim_t>(fs::file_size(path_));
  for (const rlim_t bytes :
       {rlim_t{1}, rlim_t{500}, rlim_t{5000}, rlim_t{6000}, rlim_t{60000}, size - 3000, size - 1}) {
    fs::remove(path_);
    EXPECT_EXIT(limited(bytes), ::testing::ExitedWithCode(3), "") << bytes << " of " << size;
  }
  fs::remove(path_);
  EXPECT_EXIT(limited(size), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace shoal
