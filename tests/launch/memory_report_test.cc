// The report of what is alive at the peak: planned and measured alike, with the knobs that shrink
// it.
#include <gtest/gtest.h>

#include <mutex>
#include <nlohmann/json.hpp>

#include "core/base/thread_count.h"
#include "core/context.h"
#include "launch/plan.h"
#include "launch/session.h"
#include "tests/launch/parity.h"
#include "tests/launch/program.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

// Of each rank: of a step that is not the first.
std::vector<MemoryReport> Measured(const TrainingOptions& options, const Recipe& recipe, int ranks,
                                   int64_t micro_batches) {
  std::vector<MemoryReport> reports(static_cast<size_t>(ranks));
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    TrainingStep step(options, c);
    Allocator& allocator = *ExecutionContext::Current().allocator();
    for (int s = 0; s < 2; ++s) {
      allocator.WatchPeak(s == 1);
      step.Run(Batches(recipe, step, s, micro_batches, InOrder()), recipe.lr);
    }
    reports[static_cast<size_t>(c.rank())] = Summarise(allocator.AtPeak());
  });
  return reports;
}

TEST(MemoryReport, OfAStepIsAsPlanned) {
  std::vector<std::pair<Recipe, int>> cases;
  for (const char* model : {"llama", "gpt2"}) {
    cases.emplace_back(Recipe{.model = model, .dtype = DType::kBF16}, 1);
    cases.emplace_back(Recipe{.model = model, .zero_stage = 3, .recompute = true}, 2);
    cases.emplace_back(Recipe{.model = model, .zero_stage = 2, .selective = true}, 3);
    cases.emplace_back(Recipe{.model = model, .tp = 2, .partition_activations = true}, 2);
    // Not a pipeline: how long a sent gradient waits is the other rank's affair.
    cases.emplace_back(Recipe{.model = model, .tp = 2, .cp = 2}, 4);
  }
  for (auto& [recipe, ranks] : cases) {
    constexpr int64_t kMicroBatches = 3;
    TrainingOptions options = Options(recipe);
    options.micro_batches = kMicroBatches;
    const auto measured = Measured(options, recipe, ranks, kMicroBatches);
    options.mesh.dp = ranks / (recipe.tp * recipe.pp * recipe.cp);
    SetKernelThreads(1);
    for (const int rank : {0, ranks - 1}) {
      std::vector<LiveBlock> at_peak;
      const int64_t sequences = kSequences / options.mesh.dp / kMicroBatches;
      const RankPlan plan = DryRun(options, {sequences, false}, rank, &at_peak);
      const MemoryReport planned = Summarise(at_peak);
      EXPECT_EQ(planned.bytes, plan.memory.peak_total);
      EXPECT_EQ(MemoryText(planned), MemoryText(measured[static_cast<size_t>(rank)]))
          << recipe.model << ", rank " << rank << " of " << ranks;
      EXPECT_GE(planned.tensors.size(), 10u);
      int64_t sum = 0;
      for (const auto& [module, bytes] : planned.modules) sum += bytes;
      EXPECT_EQ(sum, planned.bytes);
    }
  }
}

TEST(MemoryReport, AlikeTensorsAreOneLine) {
  const auto block = [](const char* module, int64_t n, Pass pass) {
    return LiveBlock{
        MemoryClass::kActivations, 4 * n, {{Intern(module), "linear", pass}, DType::kF32, {n}}};
  };
  const std::vector<LiveBlock> live = {
      block("blocks.0.mlp.up", 10, Pass::kForward),
      block("blocks.11.mlp.up", 10, Pass::kForward),
      block("blocks.0.mlp.up", 10, Pass::kBackward),
      block("blocks.0.mlp.up", 25, Pass::kForward),
      block("embed.weight .. blocks.1.norm.weight", 1, Pass::kNone),
      block("blocks.2.norm.weight .. blocks.1.norm.weight", 1, Pass::kNone)};
  const MemoryReport report = Summarise(live);
  ASSERT_EQ(report.tensors.size(), 5u);
  EXPECT_EQ(report.bytes, 228);
  EXPECT_EQ(report.tensors[0].bytes, 100);
  EXPECT_EQ(report.tensors[1].count, 2);
  EXPECT_EQ(report.tensors[1].bytes, 80);
  EXPECT_EQ(report.tensors[1].module, "blocks.*.mlp.up");
  EXPECT_EQ(report.tensors[1].pass, "forward");
  EXPECT_EQ(report.modules,
            (std::vector<std::pair<std::string, int64_t>>{{"blocks", 224}, {"several", 4}}));
  nlohmann::ordered_json json;
  WriteMemory(report, &json);
  EXPECT_EQ(MemoryText(ReadMemory(json)), MemoryText(report));
  json["peak_tensors"][0]["bytes"] = "many";
  EXPECT_TRUE(ReadMemory(json).tensors.empty());
}

class Knobs : public ProgramTest {
 protected:
  Plan Planned(const Settings& settings, int ranks) {
    Config config = ParseConfig(settings.Text(), "a.toml");
    ResolveModel(&config, 257);
    SetKernelThreads(1);
    const BatchPlan batch = CheckBatch(config, ranks);
    return MakePlan(config, MakeTrainingOptions(config, batch), ranks);
  }
  static bool Names(const Plan& plan, const std::string& knob) {
    for (const Trial& trial : plan.trials)
      if (trial.knob.text.find(knob) != std::string::npos) return true;
    return false;
  }
  static Settings Long() {
    return Settings().Set("model.layers", "6").Set("data.sequence_length", "64");
  }
};

TEST_F(Knobs, OnlyWhatChangesSomething) {
  const Plan one = Planned(Long(), 1);
  for (const char* knob : {"zero.stage", "mesh.", "partition", "precision"})
    EXPECT_FALSE(Names(one, knob)) << knob;
  EXPECT_TRUE(Names(one, "memory.recompute = \"full\""));
  EXPECT_TRUE(Names(one, "batch.micro = 1"));
  const Plan three = Planned(Long()
                                 .Set("zero.stage", "3")
                                 .Set("memory.recompute", "\"full\"")
                                 .Set("zero.offload", "\"file\"")
                                 .Set("batch.micro", "1"),
                             2);
  for (const char* knob : {"zero.stage", "memory.recompute", "batch.micro", "zero.offload ="})
    EXPECT_FALSE(Names(three, knob)) << knob;
  const Plan split = Planned(Long().Set("mesh.tp", "2").Set("batch.micro", "1"), 4);
  for (const char* knob :
       {"memory.partition_activations = true", "mesh.sequence_parallel = true", "zero.stage = 1"})
    EXPECT_TRUE(Names(split, knob)) << knob;
  // Where `auto` has chosen, its choice is what the changes are tried on.
  Settings chosen = Long();
  chosen.Set("memory.recompute", "\"auto\"").Set("memory.budget", std::to_string(one.peak() - 1));
  const Plan automatic = Planned(chosen, 1);
  EXPECT_TRUE(Names(automatic, "memory.recompute = \"full\""));
  for (const Trial& trial : automatic.trials) EXPECT_LE(trial.peak, automatic.peak());
}

// A line's knob, turned, gives the peak that was said, and less of that line's class at it.
TEST_F(Knobs, AreAsTheyWereTried) {
  const Settings settings = Long().Set("batch.micro", "1");
  const Plan plan = Planned(settings, 2);
  EXPECT_TRUE(Names(plan, "mesh.tp = 2"));
  ASSERT_FALSE(plan.at_peak.tensors.empty());
  EXPECT_EQ(plan.at_peak.bytes, plan.peak());
  for (const MemoryLine& line : plan.at_peak.tensors) {
    const std::string &what = line.memory_class, &knob = line.knob;
    if (what == "optimizer") {
      EXPECT_TRUE(knob.starts_with("zero.") || knob.starts_with("mesh.")) << knob;
    } else if (what == "parameters") {
      EXPECT_TRUE(knob == "zero.stage = 3" || knob.starts_with("mesh.")) << knob;
    } else if (what == "activations") {
      EXPECT_TRUE(knob.starts_with("memory.") || knob.starts_with("mesh.")) << knob;
    }
  }
  for (const Trial& trial : plan.trials) {
    if (trial.knob.text != "memory.recompute = \"full\"" && trial.knob.text != "zero.stage = 2")
      continue;
    const size_t equals = trial.knob.text.find(" = ");
    Settings turned = settings;
    turned.Set(trial.knob.text.substr(0, equals), trial.knob.text.substr(equals + 3));
    EXPECT_EQ(Planned(turned, 2).peak(), trial.peak) << trial.knob.text;
    EXPECT_LT(trial.peak, plan.peak());
  }
}

}  // namespace
}  // namespace shoal
