// What optim.non_finite promises, with batches that a test has poisoned: one token, so on one rank.
#include <fstream>

#include "checkpoint/manifest.h"
#include "core/base/mutation.h"
#include "launch/trainer.h"
#include "tests/launch/program.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kSequences = 12, kLength = 8;

class NonFinite : public ProgramTest {
 protected:
  void TearDown() override { active_mutation = Mutation::kNone; }

  // Batches `first` to `last` of the data, from 1.
  static void Poison(int64_t first, int64_t last, Mutation what = Mutation::kInfiniteLoss) {
    poisoned_token = (first - 1) * kSequences * kLength + 5;
    poisoned_tokens = (last - first) * kSequences * kLength + 1;
    active_mutation = what;
  }

  Config Configured(const char* policy, const std::string& run = "run") const {
    Settings s(Path("corpus.txt"));
    s.Set("run.dir", "\"" + Path(run) + "\"").Set("run.steps", "12");
    s.Set("optim.non_finite", std::string("\"") + policy + "\"");
    s.Set("optim.schedule", "\"constant\"").Set("checkpoint.every", "2");
    s.Set("checkpoint.keep", "99");
    return ParseConfig(s.Text(), "a.toml");
  }
  static int Trained(const Config& config, int ranks) {
    std::atomic<int> code = -1;
    RunThreadRanks(ranks, 1, [&](Communicator& c) {
      const int mine = shoal::Train(config, c);
      if (c.rank() == 0) code = mine;
    });
    return code;
  }
  std::string ErrorOf(const Config& config, int ranks) const {
    try {
      Trained(config, ranks);
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::kConfig) << e.message();
      return e.message();
    }
    ADD_FAILURE() << "no error";
    return "";
  }
  Manifest Save(int64_t step, const std::string& run = "run") const {
    return ReadManifest(SavePath(Path(run + "/checkpoints"), step));
  }
  std::string Digests(int64_t step, const std::string& run = "run") const {
    return PartToText(Save(step, run).all);
  }
  void ExpectFiniteSaves() const {
    for (const int64_t step : SavedSteps("run"))
      EXPECT_NO_THROW(VerifySave(SavePath(Path("run/checkpoints"), step)));
    for (const auto& [name, values] : Tensors("run"))
      for (const double v : values) ASSERT_TRUE(std::isfinite(v)) << name;
  }
};

TEST_F(NonFinite, HaltKeepsTheLastSave) {
  Poison(4, 4);
  for (const int ranks : {1, 2}) {
    fs::remove_all(Path("run"));
    EXPECT_NE(ErrorOf(Configured("halt"), ranks).find("not finite at step 4"), std::string::npos);
    EXPECT_EQ(SavedSteps("run"), (std::vector<int64_t>{2}));
    ExpectFiniteSaves();
  }
}

TEST_F(NonFinite, SkipLeavesTheStateAsItWas) {
  Poison(4, 4);
  for (const int ranks : {1, 3}) {
    fs::remove_all(Path("run"));
    Config config = Configured("skip");
    config.checkpoint.every = 1;
    config.zero.stage = ranks == 3 ? 2 : 0;
    EXPECT_EQ(Trained(config, ranks), 0);
    const std::vector<StepMetrics> metrics = Metrics("run");
    ASSERT_EQ(metrics.size(), 12u);
    for (const StepMetrics& m : metrics) {
      EXPECT_EQ(m.skipped, m.step == 4);
      EXPECT_EQ(std::isfinite(m.loss), m.step != 4);
    }
    EXPECT_EQ(Digests(3), Digests(4));
    EXPECT_NE(Digests(4), Digests(5));
    EXPECT_EQ(Save(4).info.updates, 3);
    EXPECT_EQ(Save(12).info.updates, 11);
    EXPECT_EQ(Save(12).info.tokens, 12 * kSequences * kLength);
    ExpectFiniteSaves();
  }
  // The number of updates is state: what goes on from a save does the same.
  fs::copy(Path("run"), Path("again"), fs::copy_options::recursive);
  for (int step = 7; step <= 12; ++step) fs::remove_all(SavePath(Path("again/checkpoints"), step));
  active_mutation = Mutation::kNone;
  RunThreadRanks(3, 1, [&](Communicator& c) { Resume(Path("again"), c); });
  EXPECT_EQ(Digests(12), Digests(12, "again"));
}

TEST_F(NonFinite, TenInARowEndTheRun) {
  Poison(3, 99);
  Config config = Configured("skip");
  config.run.steps = 40;
  EXPECT_NE(ErrorOf(config, 2).find("not finite at step 12"), std::string::npos);
  EXPECT_EQ(Metrics("run").size(), 12u);
  ExpectFiniteSaves();
  // Nine do not.
  fs::remove_all(Path("run"));
  Poison(3, 11);
  config.run.steps = 14;
  EXPECT_EQ(Trained(config, 1), 0);
}

TEST_F(NonFinite, RollbackGoesOnAfterTheBatch) {
  for (const int ranks : {1, 2}) {
    Poison(7, 7);
    fs::remove_all(Path("run"));
    fs::remove_all(Path("again"));
    EXPECT_EQ(Trained(Configured("rollback"), ranks), 0);
    const std::vector<StepMetrics> metrics = Metrics("run");
    ASSERT_EQ(metrics.size(), 12u);
    for (size_t i = 0; i < metrics.size(); ++i) {
      EXPECT_EQ(metrics[i].step, static_cast<int64_t>(i) + 1);
      EXPECT_TRUE(std::isfinite(metrics[i].loss));
    }
    EXPECT_EQ(Save(6).info.data_offset, 0);
    EXPECT_EQ(Save(12).info.data_offset, 1);
    EXPECT_EQ(Save(12).info.updates, 12);
    ExpectFiniteSaves();
    // Killed after step 9 of the new course, it goes on with the data where that was.
    active_mutation = Mutation::kNone;
    fs::copy(Path("run"), Path("again"), fs::copy_options::recursive);
    for (const int64_t step : {10, 12}) fs::remove_all(SavePath(Path("again/checkpoints"), step));
    RunThreadRanks(ranks, 1, [&](Communicator& c) { Resume(Path("again"), c); });
    EXPECT_EQ(Digests(12), Digests(12, "again"));
    // Another course than that of a run which met no such batch.
    fs::remove_all(Path("again"));
    EXPECT_EQ(Trained(Configured("rollback", "again"), ranks), 0);
    EXPECT_EQ(Digests(6), Digests(6, "again"));
    EXPECT_NE(Digests(8), Digests(8, "again"));
  }
}

TEST_F(NonFinite, RollbacksEnd) {
  Poison(5, 99);
  Config config = Configured("rollback");
  EXPECT_NE(ErrorOf(config, 2).find("after 3 rollbacks to"), std::string::npos);
  EXPECT_EQ(SavedSteps("run"), (std::vector<int64_t>{2, 4}));
  ExpectFiniteSaves();
  // Three are enough for three batches.
  fs::remove_all(Path("run"));
  Poison(5, 7);
  EXPECT_EQ(Trained(config, 1), 0);
  EXPECT_EQ(Save(12).info.data_offset, 3);
  fs::remove_all(Path("run"));
  Poison(1, 1);
  EXPECT_NE(ErrorOf(config, 1).find("there is no save to go back to"), std::string::npos);
}

// Weights that an update has made infinite are found by the save, before or without a loss that
// shows it: that save is none, and the run goes back to the one before, or ends there.
TEST_F(NonFinite, ASaveThatIsNotFiniteIsNone) {
  for (const int64_t steps : {5, 8}) {
    for (const int ranks : {1, 2}) {
      SCOPED_TRACE(fmt::format("{} steps, {} ranks", steps, ranks));
      Poison(5, 5, Mutation::kInfiniteUpdate);
      fs::remove_all(Path("run"));
      Config config = Configured("rollback");
      config.run.steps = steps;
      config.checkpoint.every = 1;
      EXPECT_EQ(Trained(config, ranks), 0);
      EXPECT_EQ(SavedSteps("run").size(), static_cast<size_t>(steps));
      EXPECT_EQ(Save(4).info.data_offset, 0);
      // Whether the save or the next loss shows it first: it is that batch which is passed over.
      EXPECT_EQ(Save(5).info.data_offset, 1);
      EXPECT_EQ(Save(steps).info.data_offset, 1);
      ExpectFiniteSaves();
      fs::remove_all(Path("run"));
      config.optim.non_finite = "skip";
      EXPECT_NE(ErrorOf(config, ranks).find("not finite"), std::string::npos);
      EXPECT_EQ(SavedSteps("run").back(), 4);
      ExpectFiniteSaves();
      for (const auto& entry : fs::directory_iterator(Path("run/checkpoints")))
        EXPECT_EQ(entry.path().extension(), "") << entry.path();
    }
  }
}

}  // namespace
}  // namespace shoal
