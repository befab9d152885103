// A save of one layout continues on any other: the same numbers to rounding, the same bits where
// the layout is the same.
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <map>
#include <mutex>

#include "checkpoint/manifest.h"
#include "checkpoint/store.h"
#include "tests/launch/parity.h"
#include "tests/launch/run_state.h"

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
    if (!load.empty()) LoadRun(step, load, from);
    for (int s = from; s < to; ++s) step.Run(Batches(recipe, step, s, 1, InOrder()), recipe.lr);
    if (!directory.empty()) {
      const std::string saved = SaveRun(step, c, directory, to);
      if (c.rank() == 0) VerifySave(saved);
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

// Ranks as dp x tp x pp at a ZeRO stage.
struct Factors {
  int dp, tp, pp, stage;
  int ranks() const { return dp * tp * pp; }
  std::string name() const { return fmt::format("dp {} tp {} pp {} zero {}", dp, tp, pp, stage); }
};

// A model of eight heads and eight blocks, eight sequences a step.
class Tiny {
 public:
  explicit Tiny(const Factors& f) {
    recipe_ = {.length = 3, .tied = true, .layers = 8, .tp = f.tp, .zero_stage = f.stage};
    recipe_.pp = f.pp;
    options_ = testing::Options(recipe_);
    ModelConfig& m = options_.model;
    m.d_model = m.heads = m.kv_heads = 8;
    m.head_dim = 2;
    m.mlp = 9;
    m.vocab = 17;
  }
  const TrainingOptions& options() const { return options_; }
  // The loss of step s.
  double Run(TrainingStep& step, int s) const {
    constexpr int64_t kRows = 8;
    const Communicator& data = step.mesh().axis(MeshAxis::kDp);
    const int64_t share = kRows / data.size();
    std::vector<int64_t> rows(static_cast<size_t>(share));
    std::iota(rows.begin(), rows.end(), data.rank() * share);
    return step.Run({{MakeBatch(s, rows, recipe_, options_.model.vocab)}}, recipe_.lr).loss;
  }

 private:
  Recipe recipe_;
  TrainingOptions options_;
};

// Whole tensors by name, of parameters and optimizer states.
using Whole = std::map<std::string, std::vector<double>>;

// Calls f(range, values) for each range of an entry's whole tensor that is here.
template <class F>
void ForEachRange(const StateEntry& entry, const F& f) {
  for (const Range& r : RangesOf(PieceOf(entry))) f(r, entry.tensor.view().as<double>() + r.local);
}

// Every save of all factorisations of 1, 2, 4 and 8 ranks, read by every one of them: tensors are
// the same to the bit, and losses go on as on one rank.
TEST(LongReshard, EveryFactorisationFromEveryOther) {
  constexpr int kSteps = 2;  // before, and after
  std::vector<Factors> all;
  for (const int ranks : {1, 2, 4, 8})
    for (int tp = 1; tp <= ranks; tp *= 2)
      for (int pp = 1; tp * pp <= ranks; pp *= 2)
        for (int stage = 0; stage <= 3; ++stage) all.push_back({ranks / tp / pp, tp, pp, stage});
  ASSERT_EQ(all.size(), 80u);
  const fs::path root = fs::temp_directory_path() / fmt::format("shoal_reshard_all_{}", getpid());
  std::vector<double> losses;
  std::vector<Whole> wholes(all.size());
  std::vector<std::string> saves(all.size());
  for (size_t a = 0; a < all.size(); ++a) {
    const fs::path directory = root / std::to_string(a);
    fs::create_directories(directory);
    std::mutex mutex;
    RunThreadRanks(all[a].ranks(), 1, [&](Communicator& c) {
      const Tiny tiny(all[a]);
      TrainingStep step(tiny.options(), c);
      for (int s = 0; s < kSteps; ++s) {
        const double loss = tiny.Run(step, s);
        if (c.rank() == 0 && a == 0) losses.push_back(loss);
      }
      const StateDict state = step.State(true);
      {
        const std::lock_guard lock(mutex);
        for (const StateEntry& entry : state) {
          std::vector<double>& whole = wholes[a][entry.name];
          whole.resize(static_cast<size_t>(entry.global_shape.numel()), NAN);
          ForEachRange(entry, [&](const Range& r, const double* values) {
            std::copy_n(values, r.count, whole.begin() + r.global);
          });
        }
      }
      const std::string saved = SaveRun(step, c, directory, kSteps);
      if (c.rank() == 0) saves[a] = saved;
      for (int s = kSteps; s < 2 * kSteps && a == 0; ++s) losses.push_back(tiny.Run(step, s));
    });
    // Nothing is missing, and the optimizer's moments are there and have moved.
    int64_t moments = 0, moved = 0;
    for (const auto& [name, values] : wholes[a]) {
      EXPECT_TRUE(
          std::none_of(values.begin(), values.end(), [](double v) { return std::isnan(v); }))
          << all[a].name() << ": " << name;
      if (!name.starts_with("optim/")) continue;
      moments += std::ssize(values);
      moved += std::count_if(values.begin(), values.end(), [](double v) { return v != 0; });
    }
    EXPECT_GT(moved, moments * 9 / 10) << all[a].name();
    EXPECT_EQ(wholes[a].size(), wholes[0].size());
  }
  ASSERT_EQ(losses.size(), 2u * kSteps);
  std::atomic<int> read = 0;
  for (const Factors& b : all) {
    RunThreadRanks(b.ranks(), 1, [&](Communicator& c) {
      const Tiny tiny(b);
      TrainingStep step(tiny.options(), c);
      for (size_t a = 0; a < all.size(); ++a) {
        const std::string what = b.name() + " from " + all[a].name();
        LoadRun(step, saves[a], kSteps);
        bool same = true;
        for (const StateEntry& entry : step.State()) {
          const std::vector<double>& whole = wholes[a].at(entry.name);
          ForEachRange(entry, [&](const Range& r, const double* values) {
            same = same && std::equal(values, values + r.count, whole.begin() + r.global);
          });
        }
        EXPECT_TRUE(same) << what;
        for (int s = kSteps; s < 2 * kSteps; ++s) {
          const double loss = tiny.Run(step, s), expected = losses[static_cast<size_t>(s)];
          EXPECT_LT(std::abs(loss - expected) / expected, 1e-10) << what << ", step " << s;
        }
        if (c.rank() == 0) ++read;
      }
    });
  }
  EXPECT_EQ(read, 80 * 80);
  fs::remove_all(root);
}

}  // namespace
}  // namespace shoal
