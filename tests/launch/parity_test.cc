// Any number of ranks and micro-batches computes what one rank does with the whole batch.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <random>

#include "launch/training_step.h"

namespace shoal {
namespace {

constexpr int64_t kSequences = 36;  // 3 ranks x 3 micro-batches, 4 x 3, ..
constexpr int kSteps = 10;

struct Recipe {
  std::string model = "llama";
  DType dtype = DType::kF64;
  std::string optimizer = "adamw";
  double lr = 1e-2;
  int64_t length = 5;  // odd
};

// Everything that must agree.
struct Outcome {
  std::vector<double> losses, norms;
  std::vector<std::string> names;
  std::vector<std::vector<double>> parameters;
};

ModelConfig Model(const std::string& name) {
  ModelConfig c;
  c.layers = 2;
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
  return c;
}

// Row i of step s: ids by a generator of its own; some labels are ignored, unequally over the rows.
Batch MakeBatch(int64_t step, const std::vector<int64_t>& rows, int64_t length, int64_t vocab) {
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
      batch.token_numbers.push_back((step * kSequences + row) * length + t);
    }
  }
  return batch;
}

Outcome Train(const Recipe& recipe, Communicator& communicator, int64_t micro_batches,
              const std::vector<int64_t>& order) {
  TrainingOptions options;
  options.model = Model(recipe.model);
  options.compute = recipe.dtype;
  options.gradients = micro_batches > 1 ? AccumulatorDType(recipe.dtype) : recipe.dtype;
  options.rule.name = recipe.optimizer;
  options.rule.weight_decay = 0.1;
  options.rule.momentum = 0.9;
  options.clip = 1;
  options.seed = 5;
  TrainingStep step(options, communicator);
  Outcome outcome;
  const int64_t share = kSequences / communicator.size(), micro = share / micro_batches;
  for (int s = 0; s < kSteps; ++s) {
    std::vector<Batch> batches;
    for (int64_t m = 0; m < micro_batches; ++m) {
      const auto first = order.begin() + communicator.rank() * share + m * micro;
      batches.push_back(MakeBatch(s, {first, first + micro}, recipe.length, options.model.vocab));
    }
    const TrainingStep::Result result = step.Run(batches, recipe.lr);
    outcome.losses.push_back(result.loss);
    outcome.norms.push_back(result.grad_norm);
  }
  for (const auto& p : step.model().Parameters()) {
    outcome.names.push_back(p->name());
    outcome.parameters.push_back(p->value().ToVector());
  }
  return outcome;
}

std::vector<int64_t> InOrder() {
  std::vector<int64_t> order(kSequences);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

Outcome OneRank(const Recipe& recipe, const std::vector<int64_t>& order = InOrder()) {
  return Train(recipe, *MakeSelfCommunicator(), 1, order);
}

double Difference(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i)
    worst = std::max(worst, std::abs(a[i] - b[i]) / std::abs(a[i]));
  return worst;
}

// Of one tensor, over max(largest value, steps lr): a gradient that is zero but for rounding moves
// AdamW by noise of about lr a step.
double ParameterDifference(const std::vector<double>& a, const std::vector<double>& b, double lr) {
  double largest = kSteps * lr, worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(a[i]));
    worst = std::max(worst, std::abs(a[i] - b[i]));
  }
  return worst / largest;
}

// GPT-2's key bias has no gradient but rounding, so AdamW moves it by noise: it is not compared.
bool IsNoise(const std::string& name) { return name.ends_with("attention.k.bias"); }

void Compare(const Recipe& recipe, const Outcome& one, const Outcome& many, double scalar,
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

class ParityLayouts : public ::testing::TestWithParam<std::tuple<std::string, int, int>> {};

TEST_P(ParityLayouts, Fp64) {
  const auto [model, ranks, micro_batches] = GetParam();
  const Recipe recipe = {.model = model};
  const Outcome one = OneRank(recipe);
  EXPECT_LT(one.losses.back(), one.losses.front() + 1);
  EXPECT_EQ(std::count_if(one.losses.begin(), one.losses.end(),
                          [](double l) { return std::isfinite(l); }),
            kSteps);
  RunThreadRanks(ranks, 1, [&, micro_batches = micro_batches](Communicator& c) {
    Compare(recipe, one, Train(recipe, c, micro_batches, InOrder()), 1e-10, 1e-10);
  });
}

INSTANTIATE_TEST_SUITE_P(All, ParityLayouts,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::Values(1, 2, 3, 4),
                                            ::testing::Values(1, 3)));

TEST(Parity, Fp32) {
  for (const char* optimizer : {"adamw", "sgd"}) {
    const Recipe recipe = {
        .model = "llama-gqa-tied", .dtype = DType::kF32, .optimizer = optimizer, .lr = 1e-3};
    const Outcome one = OneRank(recipe);
    RunThreadRanks(3, 1, [&](Communicator& c) {
      Compare(recipe, one, Train(recipe, c, 2, InOrder()), 1e-5,
              recipe.optimizer == "sgd" ? 1e-5 : 1e-4);
    });
  }
}

// bf16 rounds every product, so the measure is what merely reordering the batch does on one rank.
TEST(Parity, Bf16WithinReorderings) {
  const Recipe recipe = {.model = "llama", .dtype = DType::kBF16, .lr = 1e-3};
  const Outcome one = OneRank(recipe);
  double spread = 0;
  std::mt19937 random(1);
  for (int i = 0; i < 5; ++i) {
    std::vector<int64_t> order = InOrder();
    std::shuffle(order.begin(), order.end(), random);
    spread = std::max(spread, Difference(one.losses, OneRank(recipe, order).losses));
  }
  EXPECT_GT(spread, 0);
  for (int64_t micro_batches : {1, 3}) {
    RunThreadRanks(2, 1, [&](Communicator& c) {
      EXPECT_LT(Difference(one.losses, Train(recipe, c, micro_batches, InOrder()).losses),
                2 * spread);
    });
  }
}

TEST(Parity, OneTokenPerSequence) {
  const Recipe recipe = {.length = 1};
  const Outcome one = OneRank(recipe);
  RunThreadRanks(4, 1, [&](Communicator& c) {
    Compare(recipe, one, Train(recipe, c, 3, InOrder()), 1e-10, 1e-10);
  });
}

// The same bits on every rank, and in every repetition.
TEST(Parity, RanksHoldTheSameBits) {
  const Recipe recipe = {.dtype = DType::kF32};
  std::vector<Outcome> outcomes(3);
  RunThreadRanks(3, 1, [&](Communicator& c) {
    outcomes[static_cast<size_t>(c.rank())] = Train(recipe, c, 2, InOrder());
  });
  for (const Outcome& other : outcomes) EXPECT_EQ(other.parameters, outcomes[0].parameters);
  RunThreadRanks(3, 1, [&](Communicator& c) {
    EXPECT_EQ(Train(recipe, c, 2, InOrder()).parameters, outcomes[0].parameters);
  });
}

TEST(MpiParity, Fp64) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) GTEST_SKIP() << "not started by mpirun";
  const auto c = MakeMpiCommunicator();
  SetThreadRank(c->rank());
  for (const char* model : {"llama", "gpt2"}) {
    const Recipe recipe = {.model = model};
    Compare(recipe, OneRank(recipe), Train(recipe, *c, 3, InOrder()), 1e-10, 1e-10);
  }
}

}  // namespace
}  // namespace shoal
