// Updates inside backward: not one bit differs from those after it, and gradients take less memory.
#include <gtest/gtest.h>

#include "core/context.h"
#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

TEST(UpdateInBackward, IsTheSameToTheBit) {
  const auto same = [](Recipe recipe, int ranks, int64_t micro_batches) {
    recipe.steps = 3;
    recipe.unclipped = true;
    const Measured after = TrainOn(recipe, ranks, micro_batches, 4000);
    recipe.in_backward = true;
    const Measured inside = TrainOn(recipe, ranks, micro_batches, 4000);
    EXPECT_TRUE(after.outcome.losses == inside.outcome.losses);
    EXPECT_TRUE(after.outcome.norms == inside.outcome.norms);
    EXPECT_TRUE(after.outcome.parameters == inside.outcome.parameters)
        << recipe.model << ", stage " << recipe.zero_stage << ", " << micro_batches;
  };
  for (const char* model : {"gpt2", "llama-gqa-tied"}) {
    for (const char* optimizer : {"adamw", "sgd"}) {
      for (int stage = 0; stage <= 3; ++stage) {
        for (const int64_t micro_batches : {1, 3}) {
          Recipe recipe = {
              .model = model, .dtype = DType::kBF16, .optimizer = optimizer, .lr = 1e-3};
          recipe.zero_stage = stage;
          same(recipe, 2, micro_batches);
        }
      }
    }
  }
  Recipe recipe = {.model = "gpt2", .dtype = DType::kF32, .lr = 1e-3};
  recipe.zero_stage = 2;
  recipe.shard_ranks = 2;
  same(recipe, 4, 3);  // shares are summed over replicas too
  recipe.shard_ranks = 0;
  recipe.offload_dir = ::testing::TempDir();
  same(recipe, 2, 1);
  recipe.offload_dir.clear();
  recipe.tp = recipe.pp = 2;
  recipe.recompute = true;
  for (const char* schedule : {"1f1b", "zb_h1"}) {
    recipe.schedule = schedule;  // the tied table's gradient comes after all passes
    same(recipe, 4, 3);
  }
}

// With one pass no more than a few buckets of gradients are there at once, however deep the model.
TEST(UpdateInBackward, GradientsTakeAFewBuckets) {
  for (const char* model : {"llama", "gpt2", "llama-gqa-tied"}) {
    const auto peak = [&](int layers, bool in_backward, int ranks, int stage) {
      Recipe recipe = {.model = model, .dtype = DType::kF32, .steps = 2};
      recipe.layers = layers;
      recipe.in_backward = in_backward;
      recipe.unclipped = true;
      recipe.zero_stage = stage;
      return TrainOn(recipe, ranks, 1, 20000).peak(MemoryClass::kGradients);
    };
    EXPECT_EQ(peak(6, true, 1, 0), peak(12, true, 1, 0));
    EXPECT_LT(peak(12, true, 1, 0), peak(12, false, 1, 0) / 3);
    EXPECT_EQ(peak(6, true, 2, 1), peak(12, true, 2, 1));
    EXPECT_EQ(peak(6, true, 2, 3), peak(12, true, 2, 3));
    EXPECT_LT(peak(12, true, 2, 3), peak(12, false, 2, 3) / 2);
  }
}

}  // namespace
}  // namespace shoal
