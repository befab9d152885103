// Saves that are written while training goes on hold the state of their step, bit by bit, whatever
// the layout and however slow the disk.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "checkpoint/manifest.h"
#include "checkpoint/saver.h"
#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h
namespace fs = std::filesystem;

constexpr int64_t kStaging = 2048;  // of a state of some hundred kilobytes

class AsyncSave : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = fs::temp_directory_path() / fmt::format("shoal_async_{}", getpid());
    fs::remove_all(directory_);
    fs::create_directories(directory_ / "at_once");
    fs::create_directories(directory_ / "behind");
  }
  void TearDown() override { fs::remove_all(directory_); }

  // What the save of `folder` says of its tensors: their digests are in it.
  std::string Tensors(const char* folder) const {
    return PartToText(ReadManifest(SavePath(directory_ / folder, 2)).all);
  }

  // Saves the state of step 2 at once, and behind steps 3 to 5 with a slow disk.
  void SaveTwice(const Recipe& recipe, int ranks, bool wait_for_copies = true) {
    RunThreadRanks(ranks, 1, [&](Communicator& c) {
      TrainingOptions options = Options(recipe);
      options.micro_batches = recipe.pp > 1 ? 3 : 1;
      TrainingStep step(options, c);
      const auto run = [&](int s) {
        step.Run(Batches(recipe, step, s, options.micro_batches, InOrder()), recipe.lr);
      };
      run(0);
      run(1);
      const auto commit = [&](const char* folder, const std::string& part) {
        const std::vector<std::string> parts = c.AllGatherStrings(part);
        if (c.rank() == 0) CommitSave(directory_ / folder, {2, 0, "", ""}, parts);
        c.Barrier();
      };
      if (c.rank() == 0) BeginSave(directory_ / "at_once", 2);
      c.Barrier();
      commit("at_once", WritePart(directory_ / "at_once", 2, c.rank(), step.State(true)));
      SaverOptions saver_options;
      saver_options.staging = kStaging;
      saver_options.before_write = [] {
        std::this_thread::sleep_for(std::chrono::microseconds(300));
      };
      Saver saver(directory_ / "behind", PlanPart(c.rank(), step.State(true)), saver_options);
      if (wait_for_copies) step.set_before_update([&] { saver.WaitCopied(); });
      saver.Warm();
      saver.Begin(2, step.State(true));
      for (int s = 2; s < 5; ++s) run(s);
      commit("behind", saver.TakePart());
      EXPECT_LE(saver.peak_staged(), kStaging);
      if (saver.plan().layout.size > kStaging) {
        EXPECT_GE(saver.peak_staged(), kStaging / 2);
      }
    });
  }

  fs::path directory_;
};

TEST_F(AsyncSave, HoldsItsStepInEveryLayout) {
  struct Case {
    const char* name;
    int ranks;
    Recipe recipe;
  };
  const std::string folder = ::testing::TempDir();
  const std::vector<Case> cases = {
      {"one", 1, {}},
      {"bf16", 1, {.model = "gpt2", .dtype = DType::kBF16}},
      {"sgd", 2, {.optimizer = "sgd"}},
      {"zero 1", 3, {.zero_stage = 1}},
      {"zero 2, offload", 2, {.zero_stage = 2, .offload_dir = folder}},
      {"zero 3", 3, {.dtype = DType::kBF16, .zero_stage = 3}},
      {"hybrid", 4, {.zero_stage = 3, .shard_ranks = 2}},
      {"shared kv heads", 4, {.model = "llama-gqa-tied", .tp = 4}},
      {"tied over a pipeline", 2, {.tied = true, .pp = 2}},
      {"zero 3, tp, offload",
       4,
       {.model = "gpt2", .tp = 2, .zero_stage = 3, .offload_dir = folder}},
      {"pipeline, zero 2, tp", 8, {.tied = true, .tp = 2, .zero_stage = 2, .pp = 2}},
      {"cp", 2, {.zero_stage = 1, .cp = 2}},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    SetUp();
    SaveTwice(c.recipe, c.ranks);
    VerifySave(SavePath(directory_ / "behind", 2));
    EXPECT_EQ(Tensors("at_once"), Tensors("behind"));
    EXPECT_GT(ReadManifest(SavePath(directory_ / "behind", 2)).all.tensors.size(), 10u);
  }
}

// The test above would notice an update that does not wait.
#ifndef __SANITIZE_THREAD__
TEST_F(AsyncSave, AnUpdateThatDoesNotWaitIsNoticed) {
  SaveTwice({}, 1, false);
  EXPECT_NE(Tensors("at_once"), Tensors("behind"));
}
#endif

// With a disk that stands still: passes go on, the update does not.
TEST_F(AsyncSave, AnUpdateWaitsForTheCopies) {
  const Recipe recipe;
  const auto communicator = MakeSelfCommunicator();
  TrainingStep step(Options(recipe), *communicator);
  std::atomic<bool> blocked = true, passed = false;
  SaverOptions options;
  options.staging = kStaging;
  options.before_write = [&] {
    while (blocked) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  Saver saver(directory_ / "behind", PlanPart(0, step.State(true)), options);
  saver.Begin(2, step.State(true));
  std::thread disk([&] {
    while (!passed) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    EXPECT_FALSE(saver.Written());
    EXPECT_EQ(step.optimizer().step(), 0);
    blocked = false;
  });
  step.set_before_update([&] {
    passed = true;
    EXPECT_TRUE(blocked);
    saver.WaitCopied();
    EXPECT_FALSE(blocked);
  });
  step.Run(Batches(recipe, step, 0, 1, InOrder()), recipe.lr);
  disk.join();
  EXPECT_EQ(step.optimizer().step(), 1);
  CommitSave(directory_ / "behind", {2, 0, "", ""}, {saver.TakePart()});
  VerifySave(SavePath(directory_ / "behind", 2));
}

// Then no save is the first to touch it, and it stays for all of them.
TEST_F(AsyncSave, StagingIsTouchedBeforehand) {
  const auto resident = [] {
    int64_t all = 0, pages = 0;
    std::ifstream("/proc/self/statm") >> all >> pages;
    return pages * sysconf(_SC_PAGESIZE);
  };
  const Tensor values = Tensor::Full({int64_t{8} << 20}, DType::kF32, 1);
  const StateDict state = {{"w", values, {int64_t{8} << 20}, {0}}};
  Saver saver(directory_ / "behind", PlanPart(0, state), {.staging = int64_t{64} << 20});
  const int64_t before = resident(), staging = saver.staging_bytes();
  EXPECT_GE(staging, saver.plan().layout.size);
  saver.Warm();
  for (int tries = 0; tries < 2000 && resident() < before + staging * 9 / 10; ++tries)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  for (int64_t step = 1; step <= 2; ++step) {
    EXPECT_GE(resident(), before + staging * 9 / 10);
    saver.Begin(step, state);
    CommitSave(directory_ / "behind", {step, 0, "", ""}, {saver.TakePart()});
    VerifySave(SavePath(directory_ / "behind", step));
  }
}

// Given up, or failed: nobody waits for it, and the next save is a save.
TEST_F(AsyncSave, FailuresAreToldOnce) {
  const Tensor values = Tensor::Full({10000}, DType::kF32, 1);
  const StateDict state = {{"w", values, {10000}, {0}}};
  const std::string folder = directory_ / "behind";
  SaverOptions options;
  options.staging = kStaging;
  Saver saver(folder, PlanPart(0, state), options);
  EXPECT_TRUE(saver.Written());
  EXPECT_TRUE(saver.Committed());
  // A file of that name is there already.
  BeginSave(folder, 1);
  WritePart(folder, 1, 0, state);
  saver.Begin(1, state);
  saver.WaitCopied();
  EXPECT_THROW(saver.TakePart(), Error);
  // Not finite.
  for (const double bad : {INFINITY, -INFINITY, NAN}) {
    values.Narrowed(0, 9999, 1).Fill(bad);
    AbandonSave(folder, 2);
    saver.Begin(2, state);
    try {
      saver.TakePart();
      ADD_FAILURE() << bad;
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::kConfig);
      EXPECT_NE(e.message().find("w is not finite"), std::string::npos) << e.message();
    }
  }
  values.Fill(2);
  saver.Begin(3, state);
  const std::string part = saver.TakePart();
  saver.Commit([](const FullDisk&) { throw Error(ErrorKind::kStorage, "a", "b", "c", 1); });
  EXPECT_THROW(saver.TakeCommit(), Error);
  saver.Commit([&](const FullDisk& full_disk) {
    CommitSave(folder, {3, 0, "", ""}, {part}, full_disk);
  });
  saver.TakeCommit();
  VerifySave(SavePath(folder, 3));
  {
    options.before_write = [] { std::this_thread::sleep_for(std::chrono::milliseconds(1)); };
    Saver abandoned(folder, PlanPart(0, state), options);
    abandoned.Begin(4, state);
  }
  EXPECT_EQ(ListSaves(folder).size(), 1u);
}

}  // namespace
}  // namespace shoal
