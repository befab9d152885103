#include "checkpoint/store.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "core/base/error.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

class Store : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = fs::temp_directory_path() / fmt::format("shoal_store_{}_{}", getpid(), counter++);
    fs::create_directories(directory_);
  }
  void TearDown() override { fs::remove_all(directory_); }

  static StateDict State(double value) {
    StateDict state;
    for (DType dtype : {DType::kF64, DType::kF32, DType::kBF16, DType::kI64}) {
      const Dims shape = dtype == DType::kF64 ? Dims{3, 5} : Dims{7};
      state.push_back({fmt::format("model/{}.weight", Name(dtype)),
                       Tensor::Full(shape, dtype, value), shape,
                       shape.rank() == 2 ? Dims{0, 0} : Dims{0}});
    }
    state.push_back({"optim/m/empty", Tensor::Empty({0}, DType::kF32), {0}, {0}});
    return state;
  }

  std::string Save(int64_t step, double value) {
    return SaveState(directory_, {step, step * 10, "a = 1\n", "fingerprint"}, State(value));
  }

  // The message of the error that f throws.
  template <class F>
  static std::string ErrorOf(F&& f) {
    try {
      f();
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::kStorage);
      return e.message();
    }
    ADD_FAILURE() << "no error";
    return "";
  }

  fs::path directory_;
  static inline int counter = 0;
};

TEST_F(Store, RoundTripIsBitwise) {
  const std::string path = Save(42, 1.5);
  EXPECT_EQ(fs::path(path).filename(), "step-00000042");
  const StateDict loaded = State(0);
  LoadState(path, loaded);
  for (const StateEntry& entry : loaded) {
    for (double v : entry.tensor.ToVector())
      EXPECT_EQ(v, entry.tensor.dtype() == DType::kI64 ? 1 : 1.5) << entry.name;
  }
  const SaveInfo info = ReadSaveInfo(path);
  EXPECT_EQ(info.step, 42);
  EXPECT_EQ(info.tokens, 420);
  EXPECT_EQ(info.config, "a = 1\n");
  EXPECT_EQ(info.data_fingerprint, "fingerprint");
  VerifySave(path);
  for (const auto& entry : fs::directory_iterator(directory_))
    EXPECT_EQ(entry.path(), path) << "left behind";
}

TEST_F(Store, ASliceLoadsItsPart) {
  std::vector<double> values(15);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i);
  const std::string path = SaveState(
      directory_, {}, {{"model/w", Tensor::From(values, {3, 5}), Dims{3, 5}, Dims{0, 0}}});
  const Tensor slice = Tensor::Empty({2, 2}, DType::kF32);
  LoadState(path, {{"model/w", slice, Dims{3, 5}, Dims{1, 3}}});
  EXPECT_EQ(slice.ToVector(), (std::vector<double>{8, 9, 13, 14}));
}

// Whatever cut a tensor is written in, any other cut reads it.
TEST_F(Store, AnyCutReadsAnyOther) {
  const Dims global = {7, 11};
  std::vector<double> values(77);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i);
  // Columns over `across` ranks, and each rank's slice, flat, over `down`.
  const auto cut = [&](int across, int down, bool filled) {
    std::vector<StateDict> parts;
    for (int a = 0; a < across; ++a) {
      const int64_t first = 11 * a / across, columns = 11 * (a + 1) / across - first;
      const Tensor slice =
          Tensor::From(values, global).Narrowed(1, first, columns).Clone().Reshaped({-1});
      for (int d = 0; d < down; ++d) {
        const int64_t begin = 7 * columns * d / down, end = 7 * columns * (d + 1) / down;
        Tensor share = slice.Narrowed(0, begin, end - begin).Clone();
        if (!filled) share.Fill(-1);
        parts.push_back({{"model/w", share, global, Dims{0, first},
                          StateEntry::Share{Dims{7, columns}, begin}}});
      }
    }
    return parts;
  };
  int step = 0;
  for (const auto& [across, down] : {std::pair(1, 1), {1, 3}, {2, 1}, {3, 5}, {11, 2}, {1, 77}}) {
    const std::vector<StateDict> written = cut(across, down, true);
    ++step;
    BeginSave(directory_, step, 0);
    std::vector<std::string> parts;
    for (size_t r = 0; r < written.size(); ++r)
      parts.push_back(WritePart(directory_, step, static_cast<int>(r), written[r]));
    const std::string path = CommitSave(directory_, {step, 0, "", ""}, parts);
    VerifySave(path);
    for (const auto& [to_across, to_down] : {std::pair(1, 1), {2, 3}, {4, 1}, {1, 13}}) {
      const std::vector<StateDict> expected = cut(to_across, to_down, true);
      const std::vector<StateDict> read = cut(to_across, to_down, false);
      for (size_t r = 0; r < read.size(); ++r) {
        LoadState(path, read[r]);
        EXPECT_EQ(read[r][0].tensor.ToVector(), expected[r][0].tensor.ToVector());
      }
    }
  }
}

TEST_F(Store, APartThatIsMissingIsNoticed) {
  const Tensor half = Tensor::Full({4}, DType::kF32, 1);
  BeginSave(directory_, 1, 0);
  const std::string part = WritePart(
      directory_, 1, 0, {{"model/w", half, Dims{8}, Dims{0}, StateEntry::Share{Dims{8}, 0}}});
  const std::string path = CommitSave(directory_, {1, 0, "", ""}, {part});
  EXPECT_NE(ErrorOf([&] { VerifySave(path); }).find("only a part"), std::string::npos);
  EXPECT_NE(ErrorOf([&] {
              LoadState(path, {{"model/w", Tensor::Empty({8}, DType::kF32), Dims{8}, Dims{0}}});
            }).find("only a part"),
            std::string::npos);
  BeginSave(directory_, 2, 0);
  AbandonSave(directory_, 2);
  EXPECT_EQ(std::distance(fs::directory_iterator(directory_), fs::directory_iterator()), 1);
}

TEST_F(Store, ListsNewestFirstAndPrunes) {
  Save(1, 1);
  Save(20, 1);
  Save(3, 1);
  fs::create_directory(directory_ / "step-00000099.partial");
  fs::create_directory(directory_ / "step-x");
  std::vector<int64_t> steps;
  for (const SaveEntry& entry : ListSaves(directory_)) steps.push_back(entry.step);
  EXPECT_EQ(steps, (std::vector<int64_t>{20, 3, 1}));
  PruneSaves(directory_, 2);
  EXPECT_EQ(ListSaves(directory_).size(), 2u);
  PruneSaves(directory_, 0);
  ASSERT_EQ(ListSaves(directory_).size(), 1u);
  EXPECT_EQ(ListSaves(directory_)[0].step, 20);
}

TEST_F(Store, SavingAStepAgainReplacesIt) {
  Save(5, 1);
  const std::string path = Save(5, 2);
  const StateDict loaded = State(0);
  LoadState(path, loaded);
  EXPECT_EQ(loaded[0].tensor.ToVector()[0], 2);
}

// Any byte of the tensors that changes is found, and the tensor named.
TEST_F(Store, AFlippedBitIsFound) {
  const std::string path = Save(1, 1.5);
  const fs::path file = fs::path(path) / "rank-0000.h5";
  std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
  std::string content((std::istreambuf_iterator<char>(bytes)), std::istreambuf_iterator<char>());
  // The bits of 1.5 in f64, fifteen times in a row.
  std::string pattern(8, '\0');
  const double value = 1.5;
  std::memcpy(pattern.data(), &value, 8);
  const size_t at = content.find(pattern);
  ASSERT_NE(at, std::string::npos);
  bytes.seekp(static_cast<std::streamoff>(at));
  bytes.put(static_cast<char>(content[at] ^ 1));
  bytes.close();
  EXPECT_NE(ErrorOf([&] { VerifySave(path); }).find("model/f64.weight"), std::string::npos);
  EXPECT_NE(ErrorOf([&] { LoadState(path, State(0)); }).find("model/f64.weight"),
            std::string::npos);
}

// A byte anywhere in a save, the library's own structures included: found, or without meaning.
TEST_F(Store, AnyDamagedByteIsFoundOrHarmless) {
  const std::string path = Save(1, 1.5);
  for (const char* name : {"manifest.json", "rank-0000.h5"}) {
    const fs::path file = fs::path(path) / name;
    std::ifstream in(file, std::ios::binary);
    const std::string good((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    int found = 0;
    for (size_t at = 0; at < good.size(); at += 1) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << at % 7));
      std::ofstream(file, std::ios::binary) << bad;
      const StateDict loaded = State(0);
      try {
        VerifySave(path);
        LoadState(path, loaded);
        const SaveInfo info = ReadSaveInfo(path);
        EXPECT_EQ(info.step, 1);
        EXPECT_EQ(info.config, "a = 1\n");
      } catch (const Error& e) {
        EXPECT_EQ(e.kind(), ErrorKind::kStorage) << name << " byte " << at << ": " << e.what();
        ++found;
        continue;
      }
      const StateDict whole = State(1.5);
      for (size_t i = 0; i < whole.size(); ++i)
        EXPECT_EQ(loaded[i].tensor.ToVector(), whole[i].tensor.ToVector())
            << name << " byte " << at;
    }
    EXPECT_GT(found, 20) << name;
    std::ofstream(file, std::ios::binary) << good;
  }
  VerifySave(path);
}

TEST_F(Store, TruncatedAndMissingFilesAreNamed) {
  const std::string path = Save(1, 1);
  fs::resize_file(fs::path(path) / "rank-0000.h5", 1000);
  EXPECT_NE(ErrorOf([&] { VerifySave(path); }).find("rank-0000.h5"), std::string::npos);
  fs::remove(fs::path(path) / "rank-0000.h5");
  EXPECT_NE(ErrorOf([&] { LoadState(path, State(0)); }).find("rank-0000.h5"), std::string::npos);
  std::ofstream(fs::path(path) / "manifest.json") << "{\"format\":";
  EXPECT_NE(ErrorOf([&] { ReadSaveInfo(path); }).find("damaged"), std::string::npos);
  std::ofstream(fs::path(path) / "manifest.json") << "{\"format\": 99}";
  EXPECT_NE(ErrorOf([&] { ReadSaveInfo(path); }).find("format 99"), std::string::npos);
  EXPECT_NE(ErrorOf([&] { ReadSaveInfo((directory_ / "none").string()); }).find("not a save"),
            std::string::npos);
}

TEST_F(Store, ADamagedManifestIsAnErrorOfStorage) {
  const std::string path = Save(1, 1);
  const fs::path file = fs::path(path) / "manifest.json";
  std::ifstream in(file);
  const std::string good((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const size_t begin = good.find("\"shape\": [") + 9, end = good.find(']', begin) + 1;
  ASSERT_LT(end, good.size());
  for (const char* shape : {"[-3, -5]", "[4611686018427387904, 4611686018427387904]", "[1e300]",
                            "[1,1,1,1,1,1,1,1]", "[1000000000000]", "[\"a\"]", "7", "null", "{}"}) {
    std::ofstream(file) << good.substr(0, begin) << shape << good.substr(end);
    EXPECT_NE(ErrorOf([&] { VerifySave(path); }), "") << shape;
    EXPECT_NE(ErrorOf([&] { LoadState(path, State(0)); }), "") << shape;
  }
  for (const char* text :
       {"", "[]", "7", "{}", "{\"format\": 1}", "{\"format\": 1, \"tensors\": 5}",
        "{\"format\": 1, \"tensors\": {\"a\": 5}}", "\xff\xfe"}) {
    std::ofstream(file) << text;
    EXPECT_NE(ErrorOf([&] { VerifySave(path); }), "") << text;
    EXPECT_NE(ErrorOf([&] { LoadState(path, State(0)); }), "") << text;
  }
}

TEST_F(Store, OtherShapesAndNamesAreNamed) {
  const std::string path = Save(1, 1);
  EXPECT_NE(ErrorOf([&] {
              LoadState(path, {{"model/f64.weight", Tensor::Empty({4}, DType::kF64), {4}, {0}}});
            }).find("shape [3, 5]"),
            std::string::npos);
  EXPECT_NE(ErrorOf([&] {
              LoadState(path, {{"model/other", Tensor::Empty({4}, DType::kF64), {4}, {0}}});
            }).find("model/other"),
            std::string::npos);
}

// A save that cannot be written leaves the earlier ones and no trace of itself.
TEST_F(Store, AFullDiskLosesNothing) {
  const std::string good = Save(1, 1);
  const StateDict large = {
      {"model/w", Tensor::Full({1 << 18}, DType::kF32, 1), Dims{1 << 18}, Dims{0}}};
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit old_limit;
  getrlimit(RLIMIT_FSIZE, &old_limit);
  rlimit limit = old_limit;
  limit.rlim_cur = 100000;  // seen before
  setrlimit(RLIMIT_FSIZE, &limit);
  const std::string refused = ErrorOf([&] { SaveState(directory_, {2, 0, "", ""}, large); });
  limit.rlim_cur = static_cast<rlim_t>(SaveBytes(large));  // met only at the end
  setrlimit(RLIMIT_FSIZE, &limit);
  const std::string message = ErrorOf([&] { SaveState(directory_, {2, 0, "", ""}, large); });
  setrlimit(RLIMIT_FSIZE, &old_limit);
  EXPECT_NE(refused.find("ulimit -f"), std::string::npos) << refused;
  EXPECT_NE(message.find("step-00000002"), std::string::npos) << message;
  EXPECT_EQ(ListSaves(directory_).size(), 1u);
  EXPECT_EQ(std::distance(fs::directory_iterator(directory_), fs::directory_iterator()), 1);
  VerifySave(good);
}

TEST_F(Store, SpaceIsCheckedBefore) {
  CheckFreeSpace(directory_, 1);
  EXPECT_NE(ErrorOf([&] { CheckFreeSpace(directory_, int64_t{1} << 60); }).find("free"),
            std::string::npos);
}

}  // namespace
}  // namespace shoal
