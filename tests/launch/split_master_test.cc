// Masters whose upper halves are the parameters: two bytes less a parameter, and the same steps.
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <mutex>

#include "checkpoint/masters.h"
#include "checkpoint/store.h"
#include "core/context.h"
#include "launch/dry_run.h"
#include "launch/plan.h"
#include "tests/launch/parity.h"
#include "tests/launch/run_state.h"
#include "tests/launch/temporary_directory.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

Recipe Split(const char* model = "gpt2") {
  Recipe recipe = {.model = model, .dtype = DType::kBF16, .lr = 1e-3, .steps = 4};
  recipe.split_master = true;
  return recipe;
}

// Where the update happens, and who does it, changes no bit.
TEST(SplitMaster, IsTheSameToTheBitOnAnyStage) {
  for (const char* optimizer : {"adamw", "sgd"}) {
    Recipe recipe = Split();
    recipe.optimizer = optimizer;
    recipe.unclipped = true;
    const Measured one = TrainOn(recipe, 2, 1, 4000);
    const auto same = [&](const char* what) {
      const Measured other = TrainOn(recipe, 2, 1, 4000);
      EXPECT_TRUE(one.outcome.losses == other.outcome.losses) << what;
      EXPECT_TRUE(one.outcome.parameters == other.outcome.parameters) << what;
    };
    for (recipe.zero_stage = 1; recipe.zero_stage <= 3; ++recipe.zero_stage) same("stage");
    recipe.zero_stage = 2;
    recipe.in_backward = true;
    same("in backward");
    recipe.offload_dir = ::testing::TempDir();
    same("in a file");
  }
}

// The exact parameters of a step, by name; halves are put together.
std::map<std::string, std::vector<double>> Masters(const std::string& save,
                                                   const ModelConfig& model) {
  SaveReader reader(save);
  std::map<std::string, std::vector<double>> masters;
  const auto built = BuildModel(model);
  for (const auto& p : built->Parameters()) {
    p->Materialize(DType::kF32);
    LoadExact(reader, {{"model/" + p->name(), p->value(), p->global_shape(), p->offset()}});
    masters[p->name()] = p->value().ToVector();
  }
  return masters;
}

// Steps [from, to) beginning with a save, if there is one, and leaving one.
std::string Continue(const Recipe& recipe, int ranks, int from, int to, const std::string& load,
                     const std::string& directory) {
  std::string saved;
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    TrainingStep step(Options(recipe), c);
    if (!load.empty()) LoadRun(step, load, from);
    for (int s = from; s < to; ++s) step.Run(Batches(recipe, step, s, 1, InOrder()), recipe.lr);
    const std::string path = SaveRun(step, c, directory, to);
    if (c.rank() == 0) saved = path;
  });
  return saved;
}

// From one form to the other and back, on any layout, no bit of a master is lost; and a step from
// the same place leads to the same place.
TEST(SplitMaster, GoesOnFromWholeOnesAndBack) {
  const TemporaryDirectory directory;
  int made = 0;
  const auto place = [&] {
    const std::string path = directory.path() + "/" + std::to_string(made++);
    std::filesystem::create_directory(path);
    return path;
  };
  for (const char* model : {"gpt2", "llama-gqa-tied"}) {
    Recipe whole = Split(model), split = Split(model);
    whole.split_master = false;
    const ModelConfig shape = Model(whole);
    // The first step begins with masters that are parameters.
    const std::string a = Continue(whole, 1, 0, 1, "", place());
    const std::string b = Continue(split, 1, 0, 1, "", place());
    const auto masters = Masters(a, shape);
    EXPECT_EQ(masters, Masters(b, shape));
    for (const Recipe& start : {whole, split}) {
      const std::string from = start.split_master ? b : a;
      for (const int ranks : {1, 2, 4}) {
        for (int stage = 0; stage <= 3; ++stage) {
          Recipe other = start.split_master ? whole : split;
          other.zero_stage = stage;
          if (ranks == 4) other.tp = 2;
          const std::string there = Continue(other, ranks, 1, 1, from, place());
          EXPECT_EQ(Masters(there, shape), masters) << ranks << " ranks, stage " << stage;
          const std::string back = Continue(start, 1, 1, 1, there, place());
          EXPECT_EQ(Masters(back, shape), masters);
        }
      }
    }
    // And the states go with them.
    const std::string on = Continue(split, 2, 1, 2, b, place());
    const std::string off = Continue(split, 2, 1, 2, Continue(whole, 1, 1, 1, b, place()), place());
    EXPECT_EQ(Masters(on, shape), Masters(off, shape));
  }
}

// Split products are rounded apart, as without it (Parity.Bf16).
TEST(SplitMaster, TrainsOnAnyMesh) {
  Recipe recipe = Split("llama");
  recipe.recompute = true;
  const Measured one = TrainOn(recipe, 1, 1);
  const auto near = [&](const char* what, int ranks) {
    const Measured many = TrainOn(recipe, ranks, 1);
    for (size_t s = 0; s < one.outcome.losses.size(); ++s)
      EXPECT_NEAR(many.outcome.losses[s], one.outcome.losses[s], 1e-4 * one.outcome.losses[s])
          << what;
  };
  recipe.zero_stage = 2;
  recipe.tp = 2;
  near("tp", 4);
  recipe.pp = 2;
  near("tp and pp", 4);
  recipe.tp = 1;
  recipe.cp = 2;
  recipe.zero_stage = 3;
  near("pp and cp", 4);
}

TEST(SplitMaster, TakesTwoBytesLess) {
  for (int stage = 0; stage <= 3; ++stage) {
    Recipe recipe = Split("llama");
    recipe.zero_stage = stage;
    recipe.steps = 1;
    const int64_t split = TrainOn(recipe, 2, 1).peak(MemoryClass::kOptimizer);
    const StateBytes bytes = StatesOf(Options(recipe));
    EXPECT_EQ(bytes.optimizer, 10);
    recipe.split_master = false;
    const int64_t whole = TrainOn(recipe, 2, 1).peak(MemoryClass::kOptimizer);
    EXPECT_EQ(5 * whole, 6 * split);
    // Both are what a dry run counts.
    recipe.split_master = true;
    TrainingOptions options = Options(recipe);
    options.mesh.dp = 2;
    const RankPlan plan = DryRun(options, {kSequences / 2, false}, 0);
    EXPECT_EQ(plan.memory.peak[static_cast<size_t>(MemoryClass::kOptimizer)], split);
  }
}

// Training is as good: what differs are ties, one value of 65,536.
TEST(SplitMaster, TrainsAsWholeOnesDo) {
  Recipe recipe = Split("llama");
  recipe.steps = kSteps;
  const Measured split = TrainOn(recipe, 1, 1);
  recipe.split_master = false;
  const Measured whole = TrainOn(recipe, 1, 1);
  EXPECT_EQ(split.outcome.losses[0], whole.outcome.losses[0]);
  for (size_t s = 0; s < whole.outcome.losses.size(); ++s)
    EXPECT_NEAR(split.outcome.losses[s], whole.outcome.losses[s], 2e-3 * whole.outcome.losses[s]);
}

}  // namespace
}  // namespace shoal
