// Trains small models on synthetic batches, to be compared over layouts: what any number of ranks
// and micro-batches computes must be what one rank does with the whole batch.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "launch/training_step.h"

namespace shoal::testing {

inline constexpr int64_t kSequences = 36;  // 3 ranks x 3 micro-batches, 4 x 3, ..
inline constexpr int kSteps = 10;

struct Recipe {
  std::string model = "llama";
  DType dtype = DType::kF64;
  std::string optimizer = "adamw";
  double lr = 1e-2;
  int64_t length = 5;  // odd
  int steps = kSteps;
  bool gqa = false, tied = false, documents = false;  // beside what the model's name says
  double dropout = 0, attention_dropout = 0;
  int layers = 2;
  int64_t heads = 0;  // 0: the model's own
  int tp = 1, zero_stage = 0;
  bool sequence_parallel = false;
  int shard_ranks = 0;
  bool contiguous_gradients = false, offload_host = false, activations_host = false;
  std::string offload_dir = {}, activations_dir = {};
  bool in_backward = false, unclipped = false, split_master = false;
  ActivationFormat compress = ActivationFormat::kOwn;
  bool recompute = false, selective = false, partition_activations = false;
  int64_t mlp_chunk_rows = 0;
  int pp = 1, virtual_stages = 1, cp = 1;
  std::optional<SequenceKind> attention = {};
  int ulysses = 0;  // of hybrid
  std::optional<bool> both_ways = {};
  SequenceLayoutKind layout = SequenceLayoutKind::kZigzag;
  std::string schedule = "1f1b";
};

// Everything that must agree.
struct Outcome {
  std::vector<double> losses, norms;
  std::vector<std::string> names;
  std::vector<std::vector<double>> parameters;
};

inline ModelConfig Model(const Recipe& recipe) {
  const std::string& name = recipe.model;
  ModelConfig c;
  c.layers = recipe.layers;
  c.d_model = 24;
  c.heads = 6;
  c.kv_heads = 6;
  c.head_dim = 4;
  c.mlp = 37;
  c.vocab = 65;
  c.context = 16;
  if (name == "gpt2") {
    c.family = "gpt2";
    c.tied = true;
    c.dropout = 0.1;
  } else if (name == "llama-gqa-tied") {
    c.kv_heads = 2;
    c.tied = true;
  }
  if (recipe.heads > 0) c.heads = recipe.heads;
  if (recipe.heads > 0 && name != "llama-gqa-tied") c.kv_heads = recipe.heads;
  if (recipe.gqa) c.kv_heads = 3;
  if (recipe.tied) c.tied = true;
  if (recipe.dropout > 0) c.dropout = recipe.dropout;
  c.attention_dropout = recipe.attention_dropout;
  return c;
}

// Row i of step s: ids by a generator of its own; some labels are ignored, unequally over the rows.
inline Batch MakeBatch(int64_t step, const std::vector<int64_t>& rows, const Recipe& recipe,
                       int64_t vocab) {
  const int64_t length = recipe.length;
  Batch batch;
  batch.count = static_cast<int64_t>(rows.size());
  batch.length = length;
  for (int64_t row : rows) {
    std::mt19937 random(static_cast<uint32_t>(step * 1000 + row));
    for (int64_t t = 0; t < length; ++t) {
      batch.tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(vocab)));
      const bool ignored = random() % 10 < static_cast<uint32_t>(row % 4);
      batch.labels.push_back(
          ignored ? kIgnoredLabel : static_cast<int32_t>(random() % static_cast<uint32_t>(vocab)));
      batch.labelled += !ignored;
      batch.positions.push_back(static_cast<int32_t>(t));
      if (recipe.documents) batch.documents.push_back(t > row % 3 ? 1 : 0);
      batch.token_numbers.push_back((step * kSequences + row) * length + t);
    }
  }
  return batch;
}

inline TrainingOptions Options(const Recipe& recipe) {
  TrainingOptions options;
  options.model = Model(recipe);
  options.compute = recipe.dtype;
  options.gradients = AccumulatorDType(recipe.dtype);
  options.split_master = recipe.split_master;
  options.rule.name = recipe.optimizer;
  options.rule.weight_decay = 0.1;
  options.rule.momentum = 0.9;
  options.clip = recipe.in_backward || recipe.unclipped ? 0 : 1;
  options.seed = 5;
  options.mesh = {.dp = 0, .tp = recipe.tp, .pp = recipe.pp, .cp = recipe.cp};
  options.sequence.schedule = recipe.attention;
  options.sequence.ulysses = recipe.ulysses;
  options.sequence.both_ways = recipe.both_ways;
  options.sequence.layout = recipe.layout;
  options.sequence.tokens = recipe.length;
  options.virtual_stages = recipe.virtual_stages;
  options.schedule = recipe.schedule;
  if (recipe.recompute || recipe.selective)
    options.recompute = RecomputeEvery(recipe.recompute, options);
  options.partition_activations = recipe.partition_activations;
  options.mlp_chunk_rows = recipe.mlp_chunk_rows;
  options.length = recipe.length;
  options.zero_stage = recipe.zero_stage;
  options.sequence_parallel = recipe.sequence_parallel;
  options.shard_ranks = recipe.shard_ranks;
  options.contiguous_gradients = recipe.contiguous_gradients;
  options.offload_host = recipe.offload_host;
  options.offload_dir = recipe.offload_dir;
  options.update_in_backward = recipe.in_backward;
  options.activations_host = recipe.activations_host;
  options.activations_dir = recipe.activations_dir;
  options.compress_activations = recipe.compress;
  return options;
}

// This replica's micro-batches of step s.
inline std::vector<Batch> Batches(const Recipe& recipe, const TrainingStep& step, int64_t s,
                                  int64_t micro_batches, const std::vector<int64_t>& order) {
  const Communicator& data = step.mesh().axis(MeshAxis::kDp);
  const int64_t share = kSequences / data.size(), micro = share / micro_batches;
  std::vector<Batch> batches;
  for (int64_t m = 0; m < micro_batches; ++m) {
    const auto first = order.begin() + data.rank() * share + m * micro;
    batches.push_back(MakeBatch(s, {first, first + micro}, recipe, Model(recipe).vocab));
  }
  return batches;
}

// `batches(step, s)`: this rank's micro-batches of step s.
template <class F>
Outcome TrainOnBatches(const Recipe& recipe, Communicator& communicator,
                       const TrainingOptions& options, F&& batches) {
  TrainingStep step(options, communicator);
  Outcome outcome;
  for (int s = 0; s < recipe.steps; ++s) {
    const TrainingStep::Result result = step.Run(batches(step, s), recipe.lr);
    outcome.losses.push_back(result.loss);
    outcome.norms.push_back(result.grad_norm);
  }
  step.optimizer().GatherParameters();
  for (const auto& p : step.parameters()) {
    outcome.names.push_back(p.name);
    outcome.parameters.push_back(step.Whole(p));
  }
  return outcome;
}

inline Outcome Train(const Recipe& recipe, Communicator& communicator, int64_t micro_batches,
                     const std::vector<int64_t>& order, const TrainingOptions& options) {
  return TrainOnBatches(recipe, communicator, options, [&](const TrainingStep& step, int64_t s) {
    return Batches(recipe, step, s, micro_batches, order);
  });
}

inline Outcome Train(const Recipe& recipe, Communicator& communicator, int64_t micro_batches,
                     const std::vector<int64_t>& order) {
  return Train(recipe, communicator, micro_batches, order, Options(recipe));
}

struct Measured {
  Outcome outcome;
  MemoryStats memory;  // rank 0's
  int64_t peak(MemoryClass c) const { return memory.peak[static_cast<size_t>(c)]; }
};

inline std::vector<int64_t> InOrder() {
  std::vector<int64_t> order(kSequences);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// On ranks of one thread each.
inline Measured TrainOn(const Recipe& recipe, int ranks, int64_t micro_batches,
                        int64_t bucket_bytes = ZeroOptions().bucket_bytes) {
  Measured measured;
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    TrainingOptions options = Options(recipe);
    options.bucket_bytes = bucket_bytes;
    Outcome outcome = Train(recipe, c, micro_batches, InOrder(), options);
    if (c.rank() == 0)
      measured = {std::move(outcome), ExecutionContext::Current().allocator()->stats()};
  });
  return measured;
}

inline Outcome OneRank(Recipe recipe, const std::vector<int64_t>& order = InOrder()) {
  recipe.tp = 1;
  recipe.zero_stage = recipe.shard_ranks = 0;
  recipe.sequence_parallel = recipe.partition_activations = false;
  // What is kept is what is rounded.
  if (recipe.compress == ActivationFormat::kOwn) {
    recipe.recompute = false;
    recipe.mlp_chunk_rows = 0;
  }
  recipe.pp = recipe.virtual_stages = recipe.cp = 1;
  recipe.schedule = "1f1b";
  recipe.offload_dir.clear();
  recipe.in_backward = false;
  // On one thread, as ranks are: a second one would afterwards wait in their way.
  Outcome outcome;
  RunThreadRanks(1, 1, [&](Communicator& c) { outcome = Train(recipe, c, 1, order); });
  return outcome;
}

// What is not a number is as far away as can be.
inline double Larger(double worst, double difference) {
  return std::isnan(difference) ? HUGE_VAL : std::max(worst, difference);
}

inline double Difference(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = a.size() == b.size() && !a.empty() ? 0 : HUGE_VAL;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    worst = Larger(worst, std::abs(a[i] - b[i]) / std::abs(a[i]));
  return worst;
}

// Of one tensor, over max(largest value, steps lr): a gradient that is zero but for rounding moves
// AdamW by noise of about lr a step.
inline double ParameterDifference(const std::vector<double>& a, const std::vector<double>& b,
                                  double lr) {
  double largest = kSteps * lr, worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(a[i]));
    worst = Larger(worst, std::abs(a[i] - b[i]));
  }
  return worst / largest;
}

// GPT-2's key bias has no gradient but rounding, so AdamW moves it by noise: it is not compared.
inline bool IsNoise(const std::string& name) { return name.ends_with("attention.k.bias"); }

inline void Compare(const Recipe& recipe, const Outcome& one, const Outcome& many, double scalar,
                    double parameter) {
  EXPECT_LT(Difference(one.losses, many.losses), scalar) << "losses";
  EXPECT_LT(Difference(one.norms, many.norms), scalar) << "gradient norms";
  ASSERT_EQ(one.names, many.names);
  for (size_t i = 0; i < one.names.size(); ++i) {
    if (IsNoise(one.names[i])) continue;
    EXPECT_LT(ParameterDifference(one.parameters[i], many.parameters[i], recipe.lr), parameter)
        << one.names[i];
  }
}

// What a layout changes in a recipe.
struct Layout {
  std::string name;
  int ranks;
  std::function<void(Recipe&)> change;
  int64_t micro_batches = 1;
};

// Every `step`-th layout computes what `one` did: f64.
inline void CompareLayouts(const Recipe& recipe, const Outcome& one,
                           const std::vector<Layout>& layouts, size_t step) {
  for (size_t i = 0; i < layouts.size(); i += step) {
    const Layout& layout = layouts[i];
    SCOPED_TRACE(recipe.model + " " + layout.name);
    Recipe there = recipe;
    layout.change(there);
    RunThreadRanks(layout.ranks, 1, [&](Communicator& c) {
      Compare(there, one, Train(there, c, layout.micro_batches, InOrder()), 1e-10, 1e-10);
    });
  }
}

}  // namespace shoal::testing
