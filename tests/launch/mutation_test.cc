// The parity tests notice known bugs of other systems (core/base/mutation.h).
#include "core/base/mutation.h"

#include <gtest/gtest.h>

#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

// The largest relative difference from one rank.
double Worst(const Recipe& recipe, int ranks, int64_t micro_batches, Mutation mutation) {
  const Outcome one = OneRank(recipe);
  active_mutation = mutation;
  double worst = 0;
  try {
    RunThreadRanks(ranks, 1, [&](Communicator& c) {
      const Outcome many = Train(recipe, c, micro_batches, InOrder());
      if (c.rank() != 0) return;
      worst = std::max(Difference(one.losses, many.losses), Difference(one.norms, many.norms));
      for (size_t i = 0; i < one.names.size(); ++i) {
        if (IsNoise(one.names[i])) continue;
        worst =
            std::max(worst, ParameterDifference(one.parameters[i], many.parameters[i], recipe.lr));
      }
    });
  } catch (...) {
    active_mutation = Mutation::kNone;
    throw;
  }
  active_mutation = Mutation::kNone;
  return worst;
}

struct MutationCase {
  Mutation mutation;
  Recipe recipe;
  int ranks;
  int64_t micro_batches;
};

TEST(Mutations, AreCaught) {
  const std::vector<MutationCase> cases = {
      {Mutation::kMeanOfMicroBatchMeans, {}, 1, 3},
      {Mutation::kMeanOfMicroBatchMeans, {}, 3, 1},
      {Mutation::kLastMicroBatchOnly, {.zero_stage = 2}, 2, 3},
      {Mutation::kLastMicroBatchOnly, {.zero_stage = 3}, 2, 3},
      {Mutation::kNormOfTheLocalShard, {.zero_stage = 1}, 3, 1},
      {Mutation::kNormOfTheLocalShard, {.tp = 2}, 2, 1},
      {Mutation::kPartialTakenForWhole, {.tp = 2}, 2, 1},
      {Mutation::kBiasOnEveryRank, {.model = "gpt2", .tp = 2}, 2, 1},
      {Mutation::kSharedHeadNotSummed, {.model = "llama-gqa-tied", .tp = 4}, 4, 1},
      {Mutation::kNormWeightNotSummed, {.tp = 2, .sequence_parallel = true}, 2, 1},
  };
  for (MutationCase m : cases) {
    m.recipe.steps = 3;
    const std::string what = fmt::format("mutation {}", static_cast<int>(m.mutation));
    EXPECT_LT(Worst(m.recipe, m.ranks, m.micro_batches, Mutation::kNone), 1e-10) << what;
    EXPECT_GT(Worst(m.recipe, m.ranks, m.micro_batches, m.mutation), 1e-6) << what;
  }
}

// 65 rows over 2 ranks: the last one is nobody's, and the whole that the ranks hold says so.
TEST(Mutations, ADroppedVocabularyRemainderIsCaught) {
  EXPECT_GT(Worst({.steps = 3, .tp = 2}, 2, 1, Mutation::kVocabularyRemainderDropped), 1e-6);
}

}  // namespace
}  // namespace shoal
