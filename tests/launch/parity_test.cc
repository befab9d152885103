// Any number of ranks and micro-batches computes what one rank does with the whole batch.
#include "tests/launch/parity.h"

#include <gtest/gtest.h>

#include <cstdlib>

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

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

INSTANTIATE_TEST_SUITE_P(Some, ParityLayouts,
                         ::testing::Combine(::testing::Values("llama-gqa-tied", "gpt2"),
                                            ::testing::Values(1, 3, 4), ::testing::Values(1, 3)));
INSTANTIATE_TEST_SUITE_P(LongAll, ParityLayouts,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::Values(1, 2, 3, 4),
                                            ::testing::Values(1, 3)));

class ParityZero : public ::testing::TestWithParam<std::tuple<std::string, int, int, int>> {};

TEST_P(ParityZero, Fp64) {
  const auto [model, stage, ranks, micro_batches] = GetParam();
  const Recipe recipe = {.model = model, .zero_stage = stage};
  const Outcome one = OneRank(recipe);
  RunThreadRanks(ranks, 1, [&, micro_batches = micro_batches](Communicator& c) {
    Compare(recipe, one, Train(recipe, c, micro_batches, InOrder()), 1e-10, 1e-10);
  });
}

INSTANTIATE_TEST_SUITE_P(Some, ParityZero,
                         ::testing::Combine(::testing::Values("llama-gqa-tied", "gpt2"),
                                            ::testing::Values(1, 2, 3), ::testing::Values(3),
                                            ::testing::Values(1, 3)));
INSTANTIATE_TEST_SUITE_P(LongAll, ParityZero,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::Values(1, 2, 3),
                                            ::testing::Values(1, 2, 3, 4),
                                            ::testing::Values(1, 3)));

// Heads, kv heads, mlp and vocabulary are divisible by none of these but by chance.
class ParityTensor : public ::testing::TestWithParam<std::tuple<std::string, int, int, int>> {};

TEST_P(ParityTensor, Fp64) {
  const auto [model, tp, dp, stage] = GetParam();
  const Recipe recipe = {.model = model, .tp = tp, .zero_stage = stage};
  const Outcome one = OneRank(recipe);
  for (const int64_t micro_batches : {1, 3}) {
    RunThreadRanks(tp * dp, 1, [&](Communicator& c) {
      Compare(recipe, one, Train(recipe, c, micro_batches, InOrder()), 1e-10, 1e-10);
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Alone, ParityTensor,
                         ::testing::Combine(::testing::Values("llama-gqa-tied", "gpt2"),
                                            ::testing::Values(2, 3, 4, 5, 6), ::testing::Values(1),
                                            ::testing::Values(0)));
INSTANTIATE_TEST_SUITE_P(WithZero, ParityTensor,
                         ::testing::Combine(::testing::Values("llama-gqa-tied", "gpt2"),
                                            ::testing::Values(3), ::testing::Values(2),
                                            ::testing::Values(1, 2, 3)));
INSTANTIATE_TEST_SUITE_P(LongMatrix, ParityTensor,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::Values(1, 2, 3, 4),
                                            ::testing::Values(1, 2, 3, 4),
                                            ::testing::Values(0, 1, 2, 3)));

// 8 heads, and 2 for keys and values, that most ranks share.
TEST(ParityWideTensor, SevenAndEightRanks) {
  for (const char* model : {"llama-gqa-tied", "gpt2"}) {
    Recipe recipe = {.model = model, .steps = 3};
    recipe.heads = 8;
    const Outcome one = OneRank(recipe);
    for (const int tp : {7, 8}) {
      recipe.tp = tp;
      for (const bool sequence_parallel : {false, true}) {
        recipe.sequence_parallel = sequence_parallel;
        RunThreadRanks(tp, 1, [&](Communicator& c) {
          Compare(recipe, one, Train(recipe, c, 1, InOrder()), 1e-10, 1e-10);
        });
      }
    }
  }
}

// Groups that each hold all states: two of three ranks, and every rank a copy of its own.
class ParityHybrid : public ::testing::TestWithParam<std::tuple<int, std::pair<int, int>, int>> {};

TEST_P(ParityHybrid, Fp64) {
  const auto [stage, ranks_and_shard, micro_batches] = GetParam();
  const Recipe recipe = {
      .model = "llama-gqa-tied", .zero_stage = stage, .shard_ranks = ranks_and_shard.second};
  const Outcome one = OneRank(recipe);
  RunThreadRanks(ranks_and_shard.first, 1, [&, micro_batches = micro_batches](Communicator& c) {
    Compare(recipe, one, Train(recipe, c, micro_batches, InOrder()), 1e-10, 1e-10);
  });
}

INSTANTIATE_TEST_SUITE_P(All, ParityHybrid,
                         ::testing::Combine(::testing::Values(1, 2, 3),
                                            ::testing::Values(std::pair(6, 3), std::pair(2, 1)),
                                            ::testing::Values(3)));

// States in a file are the same states, to the bit.
TEST(ParityOffload, StatesInAFile) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (int stage = 0; stage <= 3; ++stage) {
      Recipe recipe = {.dtype = dtype, .zero_stage = stage};
      std::vector<Outcome> outcomes(2);
      for (const std::string& dir : {std::string(), ::testing::TempDir()}) {
        recipe.offload_dir = dir;
        RunThreadRanks(2, 1, [&](Communicator& c) {
          const Outcome outcome = Train(recipe, c, 2, InOrder());
          if (c.rank() == 0) outcomes[dir.empty() ? 0 : 1] = outcome;
        });
      }
      EXPECT_EQ(outcomes[0].losses, outcomes[1].losses);
      EXPECT_EQ(outcomes[0].parameters, outcomes[1].parameters);
    }
  }
}

// Norms and residuals on shares of the tokens that nothing divides: 36 x 5 over 2 to 6 ranks, and
// one token in all.
class ParitySequence : public ::testing::TestWithParam<std::tuple<std::string, int, int, int>> {};

TEST_P(ParitySequence, Fp64) {
  const auto [model, tp, dp, stage] = GetParam();
  for (const int64_t length : {5, 1}) {
    const Recipe recipe = {
        .model = model, .length = length, .tp = tp, .zero_stage = stage, .sequence_parallel = true};
    const Outcome one = OneRank(recipe);
    for (const int64_t micro_batches : {1, 9}) {
      RunThreadRanks(tp * dp, 1, [&, micro_batches = micro_batches](Communicator& c) {
        Compare(recipe, one, Train(recipe, c, micro_batches, InOrder()), 1e-10, 1e-10);
      });
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Some, ParitySequence,
                         ::testing::Combine(::testing::Values("llama-gqa-tied", "gpt2"),
                                            ::testing::Values(2, 3), ::testing::Values(1),
                                            ::testing::Values(0, 3)));
INSTANTIATE_TEST_SUITE_P(LongAll, ParitySequence,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::Values(2, 3, 5), ::testing::Values(1, 2),
                                            ::testing::Values(0, 1, 2, 3)));

TEST(Parity, Fp32) {
  for (const char* optimizer : {"adamw", "sgd"}) {
    Recipe recipe = {
        .model = "llama-gqa-tied", .dtype = DType::kF32, .optimizer = optimizer, .lr = 1e-3};
    const Outcome one = OneRank(recipe);
    for (const auto& [tp, stage] : {std::pair(1, 0), {1, 1}, {1, 2}, {1, 3}, {3, 0}, {3, 3}}) {
      recipe.tp = tp;
      recipe.zero_stage = stage;
      RunThreadRanks(3 * tp, 1, [&](Communicator& c) {
        Compare(recipe, one, Train(recipe, c, 2, InOrder()), 1e-5,
                recipe.optimizer == "sgd" ? 1e-5 : 1e-4);
      });
    }
  }
}

// bf16 rounds every product, so the measure is what merely reordering the batch does on one rank.
// That is often nothing at all: exchanged sums are f32, and their last digits seldom move a rounded
// weight.
double SpreadOfReorderings(const Recipe& recipe, const Outcome& one) {
  double spread = 0;
  std::mt19937 random(1);
  for (int i = 0; i < 5; ++i) {
    std::vector<int64_t> order = InOrder();
    std::shuffle(order.begin(), order.end(), random);
    spread = std::max(spread, Difference(one.losses, OneRank(recipe, order).losses));
  }
  return spread;
}

TEST(Parity, Bf16) {
  Recipe recipe = {.model = "llama", .dtype = DType::kBF16, .lr = 1e-3};
  const Outcome one = OneRank(recipe);
  const double spread = SpreadOfReorderings(recipe, one);
  for (int stage = 0; stage <= 3; ++stage) {
    recipe.zero_stage = stage;
    for (int64_t micro_batches : {1, 3}) {
      RunThreadRanks(2, 1, [&](Communicator& c) {
        EXPECT_LT(Difference(one.losses, Train(recipe, c, micro_batches, InOrder()).losses),
                  2 * spread + 1e-12);
      });
    }
  }
  // A split product is rounded from another f32 sum, in every activation and not only in the
  // gradients' sums: more than reordering a batch does, and still far below bf16's 4e-3.
  for (const int tp : {2, 3}) {
    recipe.tp = tp;
    RunThreadRanks(tp, 1, [&](Communicator& c) {
      EXPECT_LT(Difference(one.losses, Train(recipe, c, 1, InOrder()).losses), 1e-4);
    });
  }
}

// AdamW moves a single element whose gradient is nearly zero by noise: of the tensor it is little.
double L2Difference(const std::vector<double>& a, const std::vector<double>& b) {
  double difference = 0, whole = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    whole += a[i] * a[i];
  }
  return std::sqrt(difference / whole);
}

// The whole matrix in f32 and bf16, whose sums depend on how they are split.
class LongMatrixNarrow : public ::testing::TestWithParam<std::tuple<std::string, int, int>> {};

TEST_P(LongMatrixNarrow, AllStages) {
  const auto [model, tp, dp] = GetParam();
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Recipe recipe = {.model = model, .dtype = dtype, .lr = 1e-3};
    const Outcome one = OneRank(recipe);
    const double spread = dtype == DType::kBF16 ? 2 * SpreadOfReorderings(recipe, one) : 0;
    recipe.tp = tp;
    for (recipe.zero_stage = 0; recipe.zero_stage <= 3; ++recipe.zero_stage) {
      for (const int64_t micro_batches : {1, 3}) {
        SCOPED_TRACE(fmt::format("{}, stage {}, {} micro-batches", Name(dtype), recipe.zero_stage,
                                 micro_batches));
        RunThreadRanks(tp * dp, 1, [&](Communicator& c) {
          const Outcome many = Train(recipe, c, micro_batches, InOrder());
          if (dtype == DType::kF32) {
            EXPECT_LT(Difference(one.losses, many.losses), 1e-5);
            EXPECT_LT(Difference(one.norms, many.norms), 1e-5);
            for (size_t i = 0; i < one.names.size(); ++i) {
              if (IsNoise(one.names[i])) continue;
              EXPECT_LT(L2Difference(one.parameters[i], many.parameters[i]), 1e-4) << one.names[i];
            }
            return;
          }
          EXPECT_LT(Difference(one.losses, many.losses), std::max(spread, tp > 1 ? 1e-4 : 1e-12));
        });
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, LongMatrixNarrow,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::Values(1, 2, 3, 4),
                                            ::testing::Values(1, 2, 3, 4)));

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
  ExecutionContext context{Device{}};
  const ContextScope scope(context);
  // As the program does; what is too small for it is copied.
  ASSERT_TRUE(c->ShareMemory());
  for (const char* model : {"llama", "gpt2"}) {
    for (int stage = 0; stage <= 3; ++stage) {
      const Recipe recipe = {.model = model, .zero_stage = stage};
      Compare(recipe, OneRank(recipe), Train(recipe, *c, 3, InOrder()), 1e-10, 1e-10);
    }
    for (const char* schedule : {"1f1b", "zb_h1"}) {
      Recipe recipe = {.model = model, .zero_stage = 2, .pp = c->size() == 3 ? 3 : 2};
      recipe.schedule = schedule;
      recipe.layers = 4;
      Compare(recipe, OneRank(recipe), Train(recipe, *c, 3, InOrder()), 1e-10, 1e-10);
    }
    for (const int tp : {c->size(), c->size() % 2 == 0 ? 2 : 1}) {
      const Recipe recipe = {.model = model, .tp = tp, .zero_stage = 3};
      Compare(recipe, OneRank(recipe), Train(recipe, *c, 3, InOrder()), 1e-10, 1e-10);
    }
  }
}

}  // namespace
}  // namespace shoal
