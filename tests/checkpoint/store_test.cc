#include "checkpoint/store.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <optional>

#include "checkpoint/manifest.h"
#include "checkpoint/part.h"
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

  std::vector<int64_t> Steps() const {
    std::vector<int64_t> steps;
    for (const SaveEntry& entry : ListSaves(directory_)) steps.push_back(entry.step);
    return steps;
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

  void DamageEach(size_t stride);

  fs::path directory_;
  static inline int counter = 0;
};
class LongStore : public Store {};

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
    BeginSave(directory_, step);
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
  BeginSave(directory_, 1);
  const std::string part = WritePart(
      directory_, 1, 0, {{"model/w", half, Dims{8}, Dims{0}, StateEntry::Share{Dims{8}, 0}}});
  const std::string path = CommitSave(directory_, {1, 0, "", ""}, {part});
  EXPECT_NE(ErrorOf([&] { VerifySave(path); }).find("only a part"), std::string::npos);
  EXPECT_NE(ErrorOf([&] {
              LoadState(path, {{"model/w", Tensor::Empty({8}, DType::kF32), Dims{8}, Dims{0}}});
            }).find("only a part"),
            std::string::npos);
  BeginSave(directory_, 2);
  AbandonSave(directory_, 2);
  EXPECT_EQ(std::distance(fs::directory_iterator(directory_), fs::directory_iterator()), 1);
}

TEST_F(Store, ListsNewestFirstAndPrunes) {
  Save(1, 1);
  Save(20, 1);
  Save(3, 1);
  fs::create_directory(directory_ / "step-00000099.partial");
  fs::create_directory(directory_ / "step-x");
  EXPECT_EQ(Steps(), (std::vector<int64_t>{20, 3, 1}));
  PruneSaves(directory_, {.keep = 0});  // never fewer than two
  EXPECT_EQ(Steps(), (std::vector<int64_t>{20, 3}));
}

TEST_F(Store, KeepsTheNewestEveryAndTheBest) {
  for (int64_t step = 1; step <= 10; ++step) {
    SaveInfo info = {step, 0, "", ""};
    info.validation_loss = step == 3 ? 1.5 : 2.0;
    SaveState(directory_, info, State(1));
  }
  PruneSaves(directory_, {.keep = 2, .keep_every = 4, .keep_best = true});
  EXPECT_EQ(Steps(), (std::vector<int64_t>{10, 9, 8, 4, 3}));
  // A damaged one counts for nothing, and is left alone while it is new.
  fs::resize_file(directory_ / "step-00000009/rank-0000.h5", 100);
  fs::remove(directory_ / "step-00000003/manifest.json");
  PruneSaves(directory_, {.keep = 2});
  EXPECT_EQ(Steps(), (std::vector<int64_t>{10, 9, 8}));
  VerifySave(directory_ / "step-00000008");
  // With one valid save left, damaged ones older than it stay too.
  fs::resize_file(directory_ / "step-00000010/rank-0000.h5", 100);
  PruneSaves(directory_, {.keep = 2});
  EXPECT_EQ(Steps(), (std::vector<int64_t>{10, 9, 8}));
}

// What a process leaves that is killed at any moment of a commit or a deletion.
TEST_F(Store, LeftoversAreRecoveredOrCleaned) {
  Save(4, 4);
  Save(5, 5);
  // Between the two renames of a save that replaces one.
  fs::rename(directory_ / "step-00000005", directory_ / "step-00000005.old");
  fs::create_directory(directory_ / "step-00000005.partial");
  EXPECT_EQ(Steps(), (std::vector<int64_t>{5, 4}));  // a reader finds it without a writer's help
  LoadState(ListSaves(directory_)[0].path, State(0));
  // After them; while it is written; while an old one is deleted.
  fs::create_directory(directory_ / "step-00000004.old");
  fs::create_directory(directory_ / "step-00000006.partial");
  fs::create_directory(directory_ / "step-00000003.doomed");
  fs::create_directory(directory_ / "step-00000002.old");  // deleted by half, of no use
  fs::create_directory(directory_ / "mine");
  RecoverSaves(directory_);
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory_))
    names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, (std::vector<std::string>{"mine", "step-00000004", "step-00000005"}));
  const StateDict loaded = State(0);
  LoadState(directory_ / "step-00000005", loaded);
  EXPECT_EQ(loaded[0].tensor.ToVector()[0], 5);
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

// A byte anywhere in a save, the library's own structures included.
void Store::DamageEach(size_t stride) {
  const std::string path = Save(1, 1.5);
  for (const char* name : {"manifest.json", "rank-0000.h5"}) {
    const fs::path file = fs::path(path) / name;
    std::ifstream in(file, std::ios::binary);
    const std::string good((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    for (size_t at = 0; at < good.size(); at += stride) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 << at % 7));
      std::ofstream(file, std::ios::binary) << bad;
      const StateDict loaded = State(0);
      for (const auto& read : std::vector<std::function<void()>>{
               [&] { VerifySave(path); }, [&] { LoadState(path, loaded); }}) {
        try {
          read();
          ADD_FAILURE() << name << " byte " << at;
        } catch (const Error& e) {
          ASSERT_EQ(e.kind(), ErrorKind::kStorage) << name << " byte " << at << ": " << e.what();
          ASSERT_NE(e.message().find(name), std::string::npos) << e.message();
        }
      }
    }
    std::ofstream(file, std::ios::binary) << good;
  }
  VerifySave(path);
}

TEST_F(Store, ADamagedByteIsFound) { DamageEach(31); }
TEST_F(LongStore, AnyDamagedByteIsFound) { DamageEach(1); }

TEST_F(Store, ASaveUnderAnothersNameIsNoticed) {
  Save(1, 1);
  const std::string path = Save(2, 2);
  for (const char* name : {"manifest.json", "rank-0000.h5"}) {
    fs::copy_file(directory_ / "step-00000001" / name, fs::path(path) / name,
                  fs::copy_options::overwrite_existing);
    EXPECT_NE(ErrorOf([&] { VerifySave(path); }), "");
    EXPECT_NE(ErrorOf([&] { LoadState(path, State(0)); }), "");
  }
  fs::rename(path, directory_ / "mine");
  EXPECT_EQ(CheckSave(directory_ / "mine").step, 1);
}

TEST_F(Store, TruncatedAndMissingFilesAreNamed) {
  const std::string path = Save(1, 1);
  for (const char* name : {"rank-0000.h5", "manifest.json"}) {
    const fs::path file = fs::path(path) / name;
    const auto bytes = fs::file_size(file);
    fs::copy_file(file, directory_ / "whole");
    for (const auto size : {bytes - 1, bytes + 1, bytes / 2, uintmax_t{0}}) {
      fs::resize_file(file, size);
      for (const auto& read :
           std::vector<std::function<void()>>{[&] { CheckSave(path); }, [&] { VerifySave(path); },
                                              [&] { LoadState(path, State(0)); }})
        EXPECT_NE(ErrorOf(read).find(name), std::string::npos) << size;
      fs::copy_file(directory_ / "whole", file, fs::copy_options::overwrite_existing);
    }
    fs::remove(directory_ / "whole");
  }
  CheckSave(path);
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

// A limit on files' size, as long as it lives.
class FileLimit {
 public:
  explicit FileLimit(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old_);
    const rlimit limit = {bytes, old_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileLimit() { setrlimit(RLIMIT_FSIZE, &old_); }

 private:
  rlimit old_;
};

// A save that cannot be written leaves the earlier ones and no trace of itself, wherever it ends.
TEST_F(Store, AFullDiskLosesNothing) {
  const std::string good = Save(1, 1);
  const StateDict large = {
      {"model/w", Tensor::Full({1 << 18}, DType::kF32, 1), Dims{1 << 18}, Dims{0}}};
  const auto size = static_cast<rlim_t>(PlanPart(0, large).layout.size);
  for (const rlim_t bytes : {rlim_t{1}, rlim_t{3000}, rlim_t{100000}, size - 1}) {
    std::string message;
    {
      const FileLimit limit(bytes);
      message = ErrorOf([&] { SaveState(directory_, {2, 0, "", ""}, large); });
    }
    EXPECT_NE(message, "");
    EXPECT_EQ(std::distance(fs::directory_iterator(directory_), fs::directory_iterator()), 1);
  }
  {
    const FileLimit limit(size);
    SaveState(directory_, {2, 0, "", ""}, large);
    EXPECT_NE(ErrorOf([&] {
                CheckFreeSpace(directory_, 1, static_cast<int64_t>(size) + 1);
              }).find("ulimit -f"),
              std::string::npos);
    // Of several files, none is as large as all.
    CheckFreeSpace(directory_, static_cast<int64_t>(size) * 2, static_cast<int64_t>(size));
  }
  VerifySave(good);
}

// A writer waits for space, says what it waits for, and goes on when it is there.
TEST_F(Store, AWriterWaitsForSpace) {
  const StateDict state = {{"model/w", Tensor::Full({50000}, DType::kF32, 1), {50000}, {0}}};
  const PartPlan plan = PlanPart(0, state);
  std::vector<std::string> warnings;
  std::optional<FileLimit> limit(std::in_place, 100000);
  FullDisk full_disk;
  full_disk.seconds = 30;
  full_disk.warn = [&](const std::string& what) {
    warnings.push_back(what);
    limit.reset();
  };
  BeginSave(directory_, 1);
  PartFile file(PartialSave(directory_, 1), plan, full_disk);
  std::string bytes(static_cast<size_t>(plan.layout.size), 0);
  file.Append(bytes.data(), PartImage(plan, state).Next(bytes.data(), plan.layout.size));
  VerifySave(CommitSave(directory_, {1, 0, "", ""}, {file.Finish()}));
  ASSERT_EQ(warnings.size(), 2u);
  EXPECT_NE(warnings[0].find("0.2 MB are to be written"), std::string::npos) << warnings[0];
  EXPECT_NE(warnings[1].find("there is room again"), std::string::npos) << warnings[1];
  // Or it gives up, when it is told to and when its time is over.
  limit.emplace(100000);
  full_disk.warn = nullptr;
  full_disk.cancelled = [] { return true; };
  BeginSave(directory_, 2);
  EXPECT_NE(
      ErrorOf([&] { PartFile(PartialSave(directory_, 2), plan, full_disk); }).find("not wanted"),
      std::string::npos);
  full_disk.cancelled = nullptr;
  full_disk.seconds = 0.3;
  BeginSave(directory_, 2);
  EXPECT_NE(
      ErrorOf([&] { PartFile(PartialSave(directory_, 2), plan, full_disk); }).find("no space left"),
      std::string::npos);
  limit.reset();
  VerifySave(directory_ / "step-00000001");
}

// Tensors of several chunks, in pieces of several ranks: what is wanted is found, and a bit that is
// wrong in a chunk that nobody wants does no harm.
TEST_F(Store, LoadsReadTheChunksTheyNeed) {
  const int64_t n = 3 * kChunkBytes / 4 + 1234;
  std::vector<float> values(static_cast<size_t>(n));
  std::iota(values.begin(), values.end(), 0.0f);
  const Tensor whole = Tensor::From(values, {n});
  BeginSave(directory_, 1);
  std::vector<std::string> parts;
  for (int r = 0; r < 2; ++r) {
    const int64_t begin = n * r / 2, count = n * (r + 1) / 2 - begin;
    parts.push_back(WritePart(
        directory_, 1, r,
        {{"w", whole.Narrowed(0, begin, count), {n}, {0}, StateEntry::Share{{n}, begin}}}));
  }
  const std::string path = CommitSave(directory_, {1, 0, "", ""}, parts);
  VerifySave(path);
  const Manifest manifest = ReadManifest(path);
  const StoredTensor& stored = manifest.all.tensors.at("w");
  ASSERT_EQ(stored.pieces.size(), 2u);
  EXPECT_EQ(stored.pieces[1].digests.size(), 2u);
  const auto load = [&](int64_t begin, int64_t count, DType dtype) {
    const Tensor part = Tensor::Empty({count}, dtype);
    const MemoryStats before = ExecutionContext::Current().allocator()->stats();
    ExecutionContext::Current().allocator()->ResetPeak();
    LoadState(path, {{"w", part, {n}, {0}, StateEntry::Share{{n}, begin}}});
    const MemoryStats after = ExecutionContext::Current().allocator()->stats();
    // A chunk, and a second one where it is converted.
    EXPECT_LE(after.peak_total - before.live_total, 3 * kChunkBytes);
    const std::vector<double> got = part.ToVector();
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; ++i)
      wrong += got[static_cast<size_t>(i)] != static_cast<double>(begin + i);
    EXPECT_EQ(wrong, 0);
  };
  load(0, n, DType::kF32);
  load(n / 2 - 5, 10, DType::kF64);
  // By HDF5 itself.
  for (const StoredPiece& p : stored.pieces) {
    std::vector<float> got(static_cast<size_t>(p.piece.count));
    ReadHdf5(path + "/" + p.file, {"w", DType::kF32, {p.piece.count}}, got.data());
    EXPECT_TRUE(std::equal(got.begin(), got.end(), values.begin() + p.piece.begin));
  }
  // A bit of the second piece's second chunk.
  const int64_t at = stored.pieces[1].at + kChunkBytes + 100;
  std::fstream file(path + "/rank-0001.h5", std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(at);
  const char byte = static_cast<char>(file.get() ^ 16);
  file.seekp(at);
  file.put(byte);
  file.close();
  load(0, n / 2 + kChunkBytes / 4, DType::kF32);
  const std::string message = ErrorOf([&] { load(n - 1, 1, DType::kF32); });
  EXPECT_NE(message.find("rank-0001.h5: tensor w is not as it was written"), std::string::npos)
      << message;
}

TEST_F(Store, SpaceIsCheckedBefore) {
  CheckFreeSpace(directory_, 1, 1);
  EXPECT_NE(ErrorOf([&] { CheckFreeSpace(directory_, int64_t{1} << 60, 1); }).find("free"),
            std::string::npos);
}

}  // namespace
}  // namespace shoal
