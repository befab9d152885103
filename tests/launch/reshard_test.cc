// A save of one layout continues on any other: the same numbers to rounding, the same bits where
// the layout is the same.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "checkpoint/store.h"
#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h
namespace fs = std::filesystem;

struct Layout {
  int ranks, zero_stage, tp, shard_ranks = 0;
  bool sequence_parallel = false, offload = false;
  int pp = 1;
  bool operator==(const Layout&) const = default;
};

constexpr int kBefore = 3, kAfter = 3;

// Steps [from, to) on `layout`, beginning with the save at `load` if it is not empty and leaving
// one in `directory`; returns the parameters.
std::vector<std::vector<double>> Continue(Recipe recipe, const Layout& layout, int from, int to,
                                          const std::string& load, const std::string& directory) {
  recipe.zero_stage = layout.zero_stage;
  recipe.tp = layout.tp;
  recipe.shard_ranks = layout.shard_ranks;
  recipe.sequence_parallel = layout.sequence_parallel;
  recipe.pp = layout.pp;
  if (layout.offload) recipe.offload_dir = ::testing::TempDir();
  std::vector<std::vector<double>> parameters;
  RunThreadRanks(layout.ranks, 1, [&](Communicator& c) {
    TrainingStep step(Options(recipe), c);
    if (!load.empty()) {
      LoadState(load, step.State());
      step.optimizer().set_step(from);
      step.optimizer().ShareValues();
    }
    for (int s = from; s < to; ++s) step.Run(Batches(recipe, step, s, 1, InOrder()), recipe.lr);
    if (!directory.empty()) {
      if (c.rank() == 0) BeginSave(directory, to);
      c.Barrier();
      const auto parts = c.AllGatherStrings(WritePart(directory, to, c.rank(), step.State(true)));
      if (c.rank() == 0) VerifySave(CommitSave(directory, {to, 0, "", ""}, parts));
      c.Barrier();
    }
    step.optimizer().GatherParameters();
    std::vector<std::vector<double>> here;
    for (const auto& p : step.parameters()) here.push_back(step.Whole(p));
    if (c.rank() == 0) parameters = std::move(here);
  });
  return parameters;
}

TEST(Reshard, AnyLayoutGoesOnFromAnyOther) {
  const std::vector<Layout> layouts = {{1, 0, 1},
                                       {2, 0, 1},
                                       {3, 1, 1},
                                       {2, 2, 1},
                                       {4, 3, 1},
                                       {3, 0, 3},
                                       {4, 1, 2},
                                       {6, 3, 3},
                                       {4, 2, 4},
                                       {4, 2, 1, 2},
                                       {4, 3, 2, 1, true, true},
                                       {6, 2, 1, 0, false, false, 3}};
  for (const DType dtype : {DType::kF64, DType::kBF16}) {
    const Recipe recipe = {.model = "llama-gqa-tied", .dtype = dtype};
    const auto whole = Continue(recipe, layouts[0], 0, kBefore + kAfter, "", "");
    for (size_t a = 0; a < layouts.size(); ++a) {
      const fs::path directory =
          fs::temp_directory_path() / fmt::format("shoal_reshard_{}_{}", getpid(), a);
      fs::create_directories(directory);
      Continue(recipe, layouts[a], 0, kBefore, "", directory);
      const std::string save = ListSaves(directory)[0].path;
      for (const Layout& b : layouts) {
        const auto got = Continue(recipe, b, kBefore, kBefore + kAfter, save, "");
        ASSERT_EQ(got.size(), whole.size());
        if (b == layouts[a]) {
          EXPECT_EQ(got, Continue(recipe, b, 0, kBefore + kAfter, "", ""));
        }
        if (dtype == DType::kBF16) continue;
        for (size_t i = 0; i < whole.size(); ++i)
          EXPECT_LT(ParameterDifference(whole[i], got[i], recipe.lr), 1e-10);
      }
      fs::remove_all(directory);
    }
  }
}

}  // namespace
}  // namespace shoal
