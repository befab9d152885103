// Whole training steps with everything on the emulated device: the numbers of one rank on the CPU.
// Wherever code of ours takes device memory for its own, the program ends.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "checkpoint/store.h"
#include "tests/cuda_emulation/device_ranks.h"
#include "tests/launch/parity.h"

namespace shoal::testing {
namespace {

struct DeviceLayout {
  std::string name;
  int ranks = 1;
  Recipe recipe;
  int64_t micro_batches = 1;
};

Recipe Small(Recipe recipe) {
  recipe.steps = 2;
  return recipe;
}

void ExpectParity(const DeviceLayout& layout) {
  Recipe recipe = layout.recipe;
  const Outcome one = OneRank(recipe);
  Outcome many;
  RunDeviceRanks(layout.ranks, [&](Communicator& c) {
    Outcome outcome = Train(recipe, c, layout.micro_batches, InOrder());
    if (c.rank() == 0) many = std::move(outcome);
  });
  Compare(recipe, one, many, 1e-10, 1e-10);
}

class DeviceTraining : public ::testing::TestWithParam<DeviceLayout> {};
TEST_P(DeviceTraining, IsOneRanksOnTheCpu) { ExpectParity(GetParam()); }

INSTANTIATE_TEST_SUITE_P(
    , DeviceTraining,
    ::testing::Values(
        DeviceLayout{"alone", 1, Small({})}, DeviceLayout{"gpt2", 1, Small({.model = "gpt2"})},
        DeviceLayout{"dp2_zero1", 2, Small({.zero_stage = 1})},
        DeviceLayout{"dp2_zero2", 2, Small({.zero_stage = 2}), 3},
        DeviceLayout{"dp3_zero3", 3, Small({.zero_stage = 3})},
        DeviceLayout{"tp2", 2,
                     Small({.model = "llama-gqa-tied", .tp = 2, .sequence_parallel = true})},
        DeviceLayout{"pp2", 2, Small({.pp = 2}), 3},
        DeviceLayout{"pp2_zb", 2, Small({.pp = 2, .schedule = "zb_h1"}), 3},
        DeviceLayout{"cp2_token_ring", 2, Small({.cp = 2, .attention = SequenceKind::kTokenRing})},
        DeviceLayout{"cp2_ulysses", 2, Small({.cp = 2, .attention = SequenceKind::kUlysses})},
        DeviceLayout{"recompute", 2,
                     Small({.tp = 2, .recompute = true, .partition_activations = true})},
        DeviceLayout{"in_backward", 2, Small({.zero_stage = 2, .in_backward = true})},
        DeviceLayout{"states_on_the_host", 2, Small({.zero_stage = 1, .offload_host = true})},
        DeviceLayout{"states_in_a_file", 2,
                     Small({.optimizer = "sgd", .zero_stage = 3, .offload_dir = "/tmp"})},
        DeviceLayout{
            "activations_on_the_host", 2,
            Small(
                {.length = 15, .tp = 2, .activations_host = true, .partition_activations = true})},
        DeviceLayout{"activations_in_a_file", 1, Small({.length = 15, .activations_dir = "/tmp"})}),
    [](const auto& info) { return info.param.name; });

using LongDeviceTraining = DeviceTraining;
TEST_P(LongDeviceTraining, IsOneRanksOnTheCpu) { ExpectParity(GetParam()); }

std::vector<DeviceLayout> ManyLayouts() {
  std::vector<DeviceLayout> layouts = {
      {"tp3_gpt2", 3, Small({.model = "gpt2", .tp = 3})},
      {"tp5", 5, Small({.tp = 5})},
      {"hybrid_sharding", 4, Small({.zero_stage = 3, .shard_ranks = 2})},
      {"documents", 2, Small({.documents = true, .cp = 2, .attention = SequenceKind::kKvRing})},
      {"zb_v", 2, Small({.layers = 4, .pp = 2, .virtual_stages = 2, .schedule = "zb_v"}), 3},
      {"selective", 2, Small({.zero_stage = 2, .selective = true}), 3},
      {"four_axes", 16,
       Small({.layers = 4, .tp = 2, .zero_stage = 3, .recompute = true, .pp = 2, .cp = 2}), 2},
      {"contiguous_gradients", 2, Small({.zero_stage = 3, .contiguous_gradients = true}), 3},
  };
  for (const char* model : {"gpt2", "llama-gqa-tied"})
    for (int stage = 0; stage < 4; ++stage)
      layouts.push_back({fmt::format("{}_zero{}", *model == 'g' ? "gpt2" : "gqa", stage), 4,
                         Small({.model = model, .tp = 2, .zero_stage = stage}), 3});
  for (int kind = 0; kind <= static_cast<int>(SequenceKind::kHybrid); ++kind)
    layouts.push_back(
        {fmt::format("attention_{}", kind), 4,
         Small({.gqa = true,
                .cp = 4,
                .attention = static_cast<SequenceKind>(kind),
                .ulysses = kind == static_cast<int>(SequenceKind::kHybrid) ? 2 : 0})});
  return layouts;
}
INSTANTIATE_TEST_SUITE_P(, LongDeviceTraining, ::testing::ValuesIn(ManyLayouts()),
                         [](const auto& info) { return info.param.name; });

// Where f64 does not hide what is rounded: ranks on devices against the same ranks on the CPU.
TEST(DeviceTrainingInBf16, IsTheCpusButForRounding) {
  for (const int tp : {1, 2}) {
    Recipe recipe = Small({.dtype = DType::kBF16, .tp = tp, .zero_stage = 2});
    recipe.layers = 1;  // tensor cores take their time here
    const auto train = [&](Outcome* outcome) {
      return [&, outcome](Communicator& c) {
        Outcome mine = Train(recipe, c, 1, InOrder());
        if (c.rank() == 0) *outcome = std::move(mine);
      };
    };
    Outcome cpu, device;
    RunThreadRanks(2, 1, train(&cpu));
    RunDeviceRanks(2, train(&device));
    EXPECT_LT(Difference(cpu.losses, device.losses), 1e-4) << tp;
    EXPECT_LT(Difference(cpu.norms, device.norms), 1e-2) << tp;
  }
}

// bf16 with f32 masters on the host: what the device's own update rounds.
TEST(DeviceOffload, UpdatesOnTheHostLikeTheDevice) {
  Recipe recipe = Small({.dtype = DType::kBF16, .layers = 1, .zero_stage = 2});
  std::vector<Outcome> outcomes;
  for (const bool host : {false, true}) {
    recipe.offload_host = host;
    RunDeviceRanks(2, [&](Communicator& c) {
      Outcome outcome = Train(recipe, c, 1, InOrder());
      if (c.rank() == 0) outcomes.push_back(std::move(outcome));
    });
  }
  EXPECT_LT(Difference(outcomes[0].losses, outcomes[1].losses), 1e-5);
  // A master that lies between two values of bf16 may be rounded to either.
  for (size_t i = 0; i < outcomes[0].names.size(); ++i) {
    EXPECT_LT(ParameterDifference(outcomes[0].parameters[i], outcomes[1].parameters[i], recipe.lr),
              1.0 / 128)
        << outcomes[0].names[i];
  }
}

// A save of ranks on devices is one of ranks on the CPU, and the other way round.
TEST(DeviceState, IsSavedAndLoadedThroughTheHost) {
  const Recipe recipe = Small({.tp = 2, .zero_stage = 1});
  const std::string folder = ::testing::TempDir() + fmt::format("device-state-{}", getpid());
  std::filesystem::create_directories(folder);
  const auto values = [](TrainingStep& step) {
    std::vector<double> all;
    for (const StateEntry& entry : step.State())
      for (const double v : entry.tensor.ToVector()) all.push_back(v);
    return all;
  };
  for (const bool from_device : {true, false}) {
    std::vector<std::vector<double>> saved(4), loaded(4);
    const auto save = [&](Communicator& c) {
      TrainingStep step(Options(recipe), c);
      step.Run(Batches(recipe, step, 0, 1, InOrder()), recipe.lr);
      if (c.rank() == 0) BeginSave(folder, from_device);
      c.Barrier();
      const std::vector<std::string> parts =
          c.AllGatherStrings(WritePart(folder, from_device, c.rank(), OnHost(step.State(true))));
      if (c.rank() == 0) CommitSave(folder, {.step = from_device}, parts);
      saved[static_cast<size_t>(c.rank())] = values(step);
    };
    const auto load = [&](Communicator& c) {
      TrainingStep step(Options(recipe), c);
      ReadOnHost(step.State(),
                 [&](const StateDict& state) { LoadState(SavePath(folder, from_device), state); });
      loaded[static_cast<size_t>(c.rank())] = values(step);
    };
    if (from_device) {
      RunDeviceRanks(4, save);
      RunThreadRanks(4, 1, load);
    } else {
      RunThreadRanks(4, 1, save);
      RunDeviceRanks(4, load);
    }
    EXPECT_EQ(saved, loaded);
    EXPECT_FALSE(saved[3].empty());
  }
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace shoal::testing
