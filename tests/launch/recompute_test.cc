// Recomputed and partitioned activations: the same bits, in less memory.
#include "memory/recompute.h"

#include <gtest/gtest.h>

#include <cmath>
#include <mutex>
#include <utility>

#include "core/context.h"
#include "launch/dry_run.h"
#include "models/presets.h"
#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

// The replay does what the first forward did, dropout included: not one bit differs, under any
// layout.
TEST(Recompute, IsTheSameToTheBit) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Recipe recipe = {.model = "gpt2", .dtype = dtype, .lr = 1e-3, .steps = 4};
    recipe.layers = 4;
    const auto both = [&](int ranks, int64_t micro_batches) {
      recipe.recompute = false;
      const Measured kept = TrainOn(recipe, ranks, micro_batches);
      recipe.recompute = true;
      const Measured again = TrainOn(recipe, ranks, micro_batches);
      EXPECT_TRUE(kept.outcome.losses == again.outcome.losses);
      EXPECT_TRUE(kept.outcome.parameters == again.outcome.parameters);
      EXPECT_LT(again.peak(MemoryClass::kActivations),
                0.75 * static_cast<double>(kept.peak(MemoryClass::kActivations)));
      recipe.recompute = false;
      recipe.selective = true;
      const Measured cheap = TrainOn(recipe, ranks, micro_batches);
      EXPECT_TRUE(kept.outcome.losses == cheap.outcome.losses);
      EXPECT_TRUE(kept.outcome.parameters == cheap.outcome.parameters);
      // Where weights' gradients are computed later, what they need is alive at the peak.
      EXPECT_LE(cheap.peak(MemoryClass::kActivations), kept.peak(MemoryClass::kActivations));
      recipe.selective = false;
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

// Bytes per block in bf16, of multi-head attention (h: d_model, f: mlp), beside what one block
// needs while it is computed; row statistics of attention and norms are f32.
TEST(Recompute, WhatIsKept) {
  const int64_t tokens = kSequences * 16;
  for (const char* model : {"llama", "gpt2"}) {
    Recipe recipe = {.model = model, .dtype = DType::kBF16, .length = 16, .steps = 1};
    const ModelConfig c = Model(recipe);
    const auto per_block = [&] {
      const auto peak = [&](int layers) {
        recipe.layers = layers;
        return TrainOn(recipe, 1, 1).peak(MemoryClass::kActivations);
      };
      EXPECT_EQ((peak(7) - peak(4)) % (3 * tokens), 0);
      return (peak(7) - peak(4)) / (3 * tokens);
    };
    const bool llama = recipe.model == "llama";
    const int64_t h = c.d_model, f = c.mlp, kv = 2 * c.kv_heads * c.head_dim;
    const int64_t norms = llama ? 2 * 4 : 4 * 4, lse = 4 * c.heads;
    // Block's input, norm, q, k, v, attention, residual, norm; the MLP's.
    EXPECT_EQ(per_block(), 2 * (6 * h + kv) + (llama ? 6 : 4) * f + norms + lse);
    recipe.selective = true;
    EXPECT_EQ(per_block(), 2 * (4 * h + kv) + (llama ? 4 : 2) * f + norms + lse);
    recipe.selective = false;
    recipe.recompute = true;
    EXPECT_EQ(per_block(), 4 * h + lse);
  }
}

// Of the two sums of a block over tensor-parallel ranks, and the two of its backward, the replay
// needs the first: behind the second is nothing that a backward reads.
TEST(Recompute, EndsBeforeTheSumBehindTheMlp) {
  for (const bool sequence_parallel : {false, true}) {
    for (const char* model : {"llama", "gpt2"}) {
      Recipe recipe = {.model = model, .dtype = DType::kF32, .steps = 1, .tp = 2};
      recipe.sequence_parallel = sequence_parallel;
      const auto per_block = [&](bool recompute) {
        recipe.recompute = recompute;
        const auto sent = [&](int layers) {
          recipe.layers = layers;
          int64_t bytes = 0;
          RunThreadRanks(2, 1, [&](Communicator& c) {
            TrainingStep step(Options(recipe), c);
            step.Run(Batches(recipe, step, 0, 1, InOrder()), recipe.lr);
            if (c.rank() == 0) bytes = step.wire_bytes(MeshAxis::kTp);
          });
          return bytes;
        };
        return sent(3) - sent(2);
      };
      const int64_t kept = per_block(false), again = per_block(true);
      // With split norms a sum is two halves, of which the MLP needs its gather, too; and what the
      // ranks add to a norm's gradients is summed.
      const int64_t norms = std::string(model) == "llama" ? 2 : 4;
      const int64_t sums = kept - (sequence_parallel ? norms * 4 * Model(recipe).d_model : 0);
      EXPECT_GT(sums, 0);
      EXPECT_EQ(8 * (again - kept), (sequence_parallel ? 3 : 2) * sums) << model;
    }
  }
}

// `auto` fits the budget, and no choice that fits is cheaper; what a run takes is what was
// foreseen.
TEST(Recompute, AutoIsTheCheapestThatFits) {
  Recipe recipe = {.model = "llama", .dtype = DType::kBF16, .length = 16, .steps = 1, .tp = 2};
  recipe.layers = 6;
  TrainingOptions options = Options(recipe);
  options.mesh.dp = 1;
  const PassShape pass = {kSequences, false};
  const auto peak = [&](int full, int selective) {
    options.recompute = {{full, selective}};
    return std::max(DryRun(options, pass, 0).memory.peak_total,
                    DryRun(options, pass, 1).memory.peak_total);
  };
  const int64_t most = peak(0, 0), least = peak(6, 0);
  for (const double share : {1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0}) {
    const int64_t budget = least + static_cast<int64_t>(share * static_cast<double>(most - least));
    double cheapest = -1;
    for (int full = 0; full <= 6; ++full) {
      for (int selective = 0; full + selective <= 6; ++selective) {
        const double cost = RecomputeCost(options, {full, selective});
        if (peak(full, selective) <= budget && (cheapest < 0 || cost < cheapest)) cheapest = cost;
      }
    }
    options.recompute.clear();
    ChooseRecompute(&options, pass, budget);
    EXPECT_EQ(RecomputeCost(options, options.recompute[0]), cheapest) << share;
  }
  options.recompute.clear();
  ChooseRecompute(&options, pass, (most + least) / 2);
  std::mutex mutex;
  RunThreadRanks(2, 1, [&](Communicator& c) {
    Train(recipe, c, 1, InOrder(), options);
    const MemoryStats real = ExecutionContext::Current().allocator()->stats();
    const MemoryStats planned = DryRun(options, pass, c.rank()).memory;
    const std::lock_guard lock(mutex);
    // Of these batches not every token has a label.
    for (int i = 0; i < kMemoryClasses; ++i)
      EXPECT_EQ(real.peak[static_cast<size_t>(i)], planned.peak[static_cast<size_t>(i)]) << i;
  });
  options.recompute.clear();
  try {
    ChooseRecompute(&options, pass, least / 2);
    FAIL() << "half of the least is no budget";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kConfig);
  }
}

// Counting blocks from the first loses nothing that matters: of all 3^6 ways to keep, recompute in
// part or wholly each of six blocks, the best that fits is not 3 % of a step faster.
TEST(LongRecompute, AutoIsNearTheBestOfAllAssignments) {
  constexpr int kBlocks = 6, kWays = 729;
  for (const char* model : {"llama", "gpt2"}) {
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      Recipe recipe = {.model = model, .dtype = dtype, .length = 16};
      recipe.layers = kBlocks;
      TrainingOptions options = Options(recipe);
      options.mesh.dp = 1;
      const PassShape pass = {kSequences, false};
      struct Way {
        int64_t peak;
        double cost;
        bool operator<(const Way& other) const { return peak < other.peak; }
      };
      std::vector<Way> ways;
      for (int way = 0; way < kWays; ++way) {
        ExecutionContext context(Device{DeviceType::kMeta});
        const ContextScope scope(context);
        const auto communicator = MakeMetaCommunicator(0, 1);
        TrainingStep step(options, *communicator);
        TrainingOptions::Recompute counts;
        int rest = way;
        for (const auto& block : step.model().blocks()) {
          const int how = std::exchange(rest, rest / 3) % 3;
          if (how == 1) ApplySelectiveRecompute(*block);
          if (how == 2) ApplyRecompute(*block);
          counts.selective += how == 1;
          counts.full += how == 2;
        }
        step.Run(Batches(recipe, step, 0, 1, InOrder()), 1);
        ways.push_back({context.allocator()->stats().peak_total, RecomputeCost(options, counts)});
      }
      std::sort(ways.begin(), ways.end());
      // The forward of blocks and twice that: less than a step.
      const double step_cost = 3 * RecomputeCost(options, {kBlocks, 0});
      const int64_t least = ways.front().peak, most = ways.back().peak;
      EXPECT_LT(least, most);
      constexpr int kBudgets = 40;
      for (int i = 0; i <= kBudgets; ++i) {
        const int64_t budget = least + (most - least) * i / kBudgets;
        double best = INFINITY;
        for (const Way& way : ways)
          if (way.peak <= budget) best = std::min(best, way.cost);
        options.recompute.clear();
        ChooseRecompute(&options, pass, budget);
        const double chosen = RecomputeCost(options, options.recompute[0]);
        options.recompute.clear();
        EXPECT_GE(chosen, best);
        EXPECT_LE(step_cost + chosen, 1.03 * (step_cost + best))
            << model << ' ' << Name(dtype) << ": " << i << " of " << kBudgets;
      }
    }
  }
}

// ZeRO-R's Pa: of a block's input each of the tensor-parallel ranks keeps its part.
TEST(PartitionedActivations, TakeLessMemory) {
  Recipe recipe = {.model = "llama", .dtype = DType::kF32, .length = 16, .steps = 2, .tp = 3};
  recipe.layers = 6;
  recipe.recompute = true;
  const Measured whole = TrainOn(recipe, 3, 1);
  recipe.partition_activations = true;
  const Measured parts = TrainOn(recipe, 3, 1);
  EXPECT_TRUE(whole.outcome.parameters == parts.outcome.parameters);
  // All six inputs are kept in parts; one is whole again while its block is recomputed, and the
  // last one is remembered.
  const int64_t input = kSequences * 16 * Model(recipe).d_model * 4;
  EXPECT_LE(parts.peak(MemoryClass::kActivations),
            whole.peak(MemoryClass::kActivations) - 4 * input * 2 / 3);
  // Where values lie apart by tokens, there is nothing left to part but what was gathered.
  recipe.sequence_parallel = true;
  recipe.recompute = recipe.partition_activations = false;
  const Measured gathered = TrainOn(recipe, 3, 1);
  recipe.partition_activations = true;
  const Measured regathered = TrainOn(recipe, 3, 1);
  EXPECT_TRUE(gathered.outcome.parameters == regathered.outcome.parameters);
  EXPECT_LT(regathered.peak(MemoryClass::kActivations),
            0.85 * static_cast<double>(gathered.peak(MemoryClass::kActivations)));
}

// Kept in a file they are the same bits, in less memory; ZeRO-R's Pa to the host is both.
TEST(OffloadedActivations, TakeLessMemory) {
  // What the ranks keep must be large enough to be worth a page.
  Recipe recipe = {.model = "llama", .dtype = DType::kF32, .length = 64, .steps = 2};
  recipe.layers = 6;
  const Measured here = TrainOn(recipe, 1, 1);
  recipe.activations_dir = ::testing::TempDir();
  const Measured there = TrainOn(recipe, 1, 1);
  EXPECT_TRUE(here.outcome.parameters == there.outcome.parameters);
  EXPECT_LT(there.peak(MemoryClass::kActivations),
            0.5 * static_cast<double>(here.peak(MemoryClass::kActivations)));
  // Two tensors of every block stay beside those in use; not one more for each layer.
  recipe.layers = 12;
  const Measured deeper = TrainOn(recipe, 1, 1);
  EXPECT_LT(deeper.peak(MemoryClass::kActivations),
            1.2 * static_cast<double>(there.peak(MemoryClass::kActivations)));
  recipe.layers = 6;
  recipe.tp = 2;
  recipe.recompute = true;
  recipe.partition_activations = true;
  const Measured parts_there = TrainOn(recipe, 2, 3);
  recipe.activations_dir.clear();
  const Measured parts = TrainOn(recipe, 2, 3);
  EXPECT_TRUE(parts.outcome.parameters == parts_there.outcome.parameters);
  EXPECT_LT(parts_there.peak(MemoryClass::kActivations), parts.peak(MemoryClass::kActivations));
  EXPECT_THROW(
      {
        recipe.activations_dir = "/nowhere";
        TrainOn(recipe, 2, 1);
      },
      Error);
}

// ZeRO-R's CB: what is on its way is a constant number of buckets, however large the model.
TEST(ConstantBuffers, BoundWhatIsOnItsWay) {
  const auto peak = [](int layers, int64_t bytes) {
    Recipe recipe = {.model = "llama", .dtype = DType::kF32, .steps = 1, .zero_stage = 2};
    recipe.layers = layers;
    return TrainOn(recipe, 2, 1, bytes).peak(MemoryClass::kCommunication);
  };
  const int64_t bucket = 20000, largest = int64_t{65} * 24 * 4;
  EXPECT_EQ(peak(4, bucket), peak(12, bucket));
  EXPECT_LE(peak(12, bucket), 4 * (bucket + largest));
  EXPECT_GT(peak(12, int64_t{1} << 30), 2 * peak(12, bucket));
}

// ZeRO-R's MD sets memory for what lives long apart, so that short lives leave no holes. What best
// fit over one range loses instead, of long models: a fiftieth while states are whole; up to
// an eighth where shares of gradients settle among whole tables that come and go.
// And with the shares of gradients in one array, which ZeRO's MD is for.
TEST(OneRange, HasFewHoles) {
  for (const char* preset : {"llama-60m", "gpt2-124m"}) {
    TrainingOptions options;
    options.model = *FindPreset(preset);
    options.compute = DType::kBF16;
    options.length = 256;
    double worst = 0, whole = 0, contiguous = 0;
    for (const int stage : {0, 2, 3}) {
      for (const int way : {0, 1, 2}) {
        for (const int micro_batches : {1, 3}) {
          options.zero_stage = stage;
          options.mesh = {.dp = 4};
          options.micro_batches = micro_batches;
          options.recompute.clear();
          if (way > 0) options.recompute = RecomputeEvery(way == 1, options);
          const MemoryStats memory = DryRun(options, {4, false}, 0).memory;
          const double holes =
              static_cast<double>(memory.extent) / static_cast<double>(memory.peak_total) - 1;
          EXPECT_GE(holes, 0);
          EXPECT_LT(holes, stage == 0 ? 0.025 : 0.125)
              << preset << ", stage " << stage << ", " << way << ", " << micro_batches;
          worst = std::max(worst, holes);
          whole = std::max(whole, stage == 0 ? holes : 0);
          if (stage == 0) continue;
          TrainingOptions md = options;
          md.contiguous_gradients = true;
          const MemoryStats with = DryRun(md, {4, false}, 0).memory;
          // One micro-batch has its peak before most shares are there. Several have all of them:
          // then the array takes nothing (but its alignment) and fills the holes.
          if (micro_batches == 1) {
            EXPECT_GT(with.peak_total, memory.peak_total);
            continue;
          }
          EXPECT_LT(std::abs(with.peak_total - memory.peak_total), 64 << 10);
          EXPECT_LT(static_cast<double>(with.extent), 1.005 * static_cast<double>(memory.extent));
          const auto saved =
              1 - static_cast<double>(with.extent) / static_cast<double>(memory.extent);
          contiguous = std::max(contiguous, saved);
        }
      }
    }
    EXPECT_GT(contiguous, 0.035) << preset;
    std::printf(
        "%s: at most %.2f %% of the peak lost between blocks, %.2f %% in stage 0; shares of "
        "gradients in one array save up to %.2f %%\n",
        preset, 100 * worst, 100 * whole, 100 * contiguous);
  }
}

}  // namespace
}  // namespace shoal
