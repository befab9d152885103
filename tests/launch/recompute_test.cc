// Recomputed and partitioned activations: the same bits, in less memory.
#include <gtest/gtest.h>

#include <mutex>

#include "core/context.h"
#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

struct Result {
  Outcome outcome;
  int64_t activations = 0, communication = 0;  // rank 0's peaks
};

Result TrainOn(const Recipe& recipe, int ranks, int64_t micro_batches,
               int64_t bucket_bytes = ZeroOptions().bucket_bytes) {
  Result result;
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    TrainingOptions options = Options(recipe);
    options.bucket_bytes = bucket_bytes;
    Outcome outcome = Train(recipe, c, micro_batches, InOrder(), options);
    if (c.rank() != 0) return;
    result.outcome = std::move(outcome);
    const MemoryStats stats = ExecutionContext::Current().allocator()->stats();
    result.activations = stats.peak[static_cast<size_t>(MemoryClass::kActivations)];
    result.communication = stats.peak[static_cast<size_t>(MemoryClass::kCommunication)];
  });
  return result;
}

// The replay does what the first forward did, dropout included: not one bit differs, under any
// layout.
TEST(Recompute, IsTheSameToTheBit) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Recipe recipe = {.model = "gpt2", .dtype = dtype, .lr = 1e-3, .steps = 4};
    recipe.layers = 4;
    const auto both = [&](int ranks, int64_t micro_batches) {
      recipe.recompute = false;
      const Result kept = TrainOn(recipe, ranks, micro_batches);
      recipe.recompute = true;
      const Result again = TrainOn(recipe, ranks, micro_batches);
      EXPECT_TRUE(kept.outcome.losses == again.outcome.losses);
      EXPECT_TRUE(kept.outcome.parameters == again.outcome.parameters);
      EXPECT_LT(again.activations, 0.75 * static_cast<double>(kept.activations));
    };
    both(1, 1);
    recipe.zero_stage = 3;
    both(2, 3);
    recipe.tp = recipe.pp = 2;
    recipe.sequence_parallel = true;
    for (const char* schedule : {"1f1b", "zb_h1"}) {
      recipe.schedule = schedule;
      both(4, 3);
    }
  }
}

// Per block: its input, attention's output and row statistics, 4 s b h + lse bytes in bf16; beside
// them, what one block needs.
TEST(Recompute, WhatIsKept) {
  const auto peak = [](int layers) {
    Recipe recipe = {.model = "llama", .dtype = DType::kBF16, .length = 16, .steps = 1};
    recipe.layers = layers;
    recipe.recompute = true;
    return TrainOn(recipe, 1, 1).activations;
  };
  const ModelConfig c = Model({});
  const int64_t tokens = kSequences * 16;
  EXPECT_EQ(peak(7) - peak(4), 3 * tokens * (4 * c.d_model + 4 * c.heads));
}

// ZeRO-R's Pa: of a block's input each of the tensor-parallel ranks keeps its part.
TEST(PartitionedActivations, TakeLessMemory) {
  Recipe recipe = {.model = "llama", .dtype = DType::kF32, .length = 16, .steps = 2, .tp = 3};
  recipe.layers = 6;
  recipe.recompute = true;
  const Result whole = TrainOn(recipe, 3, 1);
  recipe.partition_activations = true;
  const Result parts = TrainOn(recipe, 3, 1);
  EXPECT_TRUE(whole.outcome.parameters == parts.outcome.parameters);
  // All six inputs are kept in parts; one is whole again while its block is recomputed, and the
  // last one is remembered.
  const int64_t input = kSequences * 16 * Model(recipe).d_model * 4;
  EXPECT_LE(parts.activations, whole.activations - 4 * input * 2 / 3);
  // Where values lie apart by tokens, there is nothing left to part but what was gathered.
  recipe.sequence_parallel = true;
  recipe.recompute = recipe.partition_activations = false;
  const Result gathered = TrainOn(recipe, 3, 1);
  recipe.partition_activations = true;
  const Result regathered = TrainOn(recipe, 3, 1);
  EXPECT_TRUE(gathered.outcome.parameters == regathered.outcome.parameters);
  EXPECT_LT(regathered.activations, 0.85 * static_cast<double>(gathered.activations));
}

// ZeRO-R's CB: what is on its way is a constant number of buckets, however large the model.
TEST(ConstantBuffers, BoundWhatIsOnItsWay) {
  const auto peak = [](int layers, int64_t bytes) {
    Recipe recipe = {.model = "llama", .dtype = DType::kF32, .steps = 1, .zero_stage = 2};
    recipe.layers = layers;
    return TrainOn(recipe, 2, 1, bytes).communication;
  };
  const int64_t bucket = 20000, largest = int64_t{65} * 24 * 4;
  EXPECT_EQ(peak(4, bucket), peak(12, bucket));
  EXPECT_LE(peak(12, bucket), 4 * (bucket + largest));
  EXPECT_GT(peak(12, int64_t{1} << 30), 2 * peak(12, bucket));
}

}  // namespace
}  // namespace shoal
