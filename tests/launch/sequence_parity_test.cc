// Any schedule of attention over any number of ranks trains as one rank does.
#include <gtest/gtest.h>

#include <array>

#include "core/context.h"
#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

void Check(const Recipe& recipe, const Outcome& one, int ranks, int64_t micro_batches) {
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    Compare(recipe, one, Train(recipe, c, micro_batches, InOrder()), 1e-10, 1e-10);
  });
}

class ParityAttention : public ::testing::TestWithParam<std::tuple<std::string, int, int>> {};

TEST_P(ParityAttention, Fp64) {
  const auto [model, kind, cp] = GetParam();
  Recipe recipe = {.model = model, .length = 13};
  const Outcome one = OneRank(recipe);
  recipe.attention = static_cast<SequenceKind>(kind);
  recipe.cp = cp;
  for (const auto layout : {SequenceLayoutKind::kContiguous, SequenceLayoutKind::kZigzag,
                            SequenceLayoutKind::kStriped}) {
    recipe.layout = layout;
    Check(recipe, one, cp, 3);
  }
}

constexpr int kHybrid = static_cast<int>(SequenceKind::kHybrid);
INSTANTIATE_TEST_SUITE_P(Some, ParityAttention,
                         ::testing::Combine(::testing::Values("llama-gqa-tied"),
                                            ::testing::Range(0, kHybrid), ::testing::Values(3)));
INSTANTIATE_TEST_SUITE_P(SomeHybrid, ParityAttention,
                         ::testing::Values(std::tuple("llama-gqa-tied", kHybrid, 4)));
INSTANTIATE_TEST_SUITE_P(LongAll, ParityAttention,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::Range(0, kHybrid),
                                            ::testing::Values(2, 3, 4, 5)));
INSTANTIATE_TEST_SUITE_P(LongHybrid, ParityAttention,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::Values(kHybrid),
                                            ::testing::Values(4, 6, 8, 9)));

Recipe OfDocuments(int layers) {
  Recipe recipe = {.model = "llama-gqa-tied", .length = 13, .steps = 3, .documents = true};
  recipe.layers = layers;
  return recipe;
}

// With everything else: ZeRO over dp x cp, tensor and pipeline parallelism, recomputation,
// documents.
void CheckBeside(std::initializer_list<int> stages) {
  Recipe recipe = OfDocuments(4);
  const Outcome one = OneRank(recipe);
  for (const SequenceKind kind : {SequenceKind::kTokenRing, SequenceKind::kUlysses}) {
    recipe.attention = kind;
    recipe.cp = 2;
    for (const int stage : stages) {
      recipe.zero_stage = stage;
      recipe.tp = recipe.pp = 1;
      recipe.recompute = recipe.sequence_parallel = false;
      Check(recipe, one, 4, 3);
      recipe.recompute = true;
      Check(recipe, one, 4, 3);
      recipe.tp = recipe.pp = 2;
      recipe.schedule = "zb_h1";
      Check(recipe, one, 8, 3);
      recipe.sequence_parallel = true;
      Check(recipe, one, 8, 3);
      recipe.schedule = "1f1b";
    }
    // 6 query and 2 kv heads on 4 ranks: attention whose heads map unevenly.
    recipe.tp = 4;
    recipe.pp = 1;
    recipe.recompute = recipe.sequence_parallel = false;
    recipe.zero_stage = 0;
    Check(recipe, one, 8, 3);
  }
}

TEST(ParityAttentionBeside, EverythingElse) { CheckBeside({3}); }
TEST(LongParityAttentionBeside, OtherStages) { CheckBeside({1, 2}); }

// Three heads of each tensor rank, one of them mirrored.
TEST(ParityAttentionBeside, HeadsBothWays) {
  Recipe recipe = OfDocuments(4);
  recipe.model = "llama";
  const Outcome one = OneRank(recipe);
  recipe.both_ways = true;
  recipe.zero_stage = 3;
  recipe.recompute = true;
  recipe.cp = 4;
  for (const SequenceKind kind :
       {SequenceKind::kTokenRing, SequenceKind::kTokenRingRelay, SequenceKind::kTokenRingLagged}) {
    recipe.attention = kind;
    Check(recipe, one, 4, 3);
  }
  recipe.attention = SequenceKind::kTokenRing;
  recipe.cp = recipe.tp = recipe.pp = 2;
  recipe.schedule = "zb_h1";
  Check(recipe, one, 8, 3);
}

// By a zigzag the third of four ranks has none of five tokens, and yet works on its heads; and of
// three tokens two of five ranks have none.
TEST(ParityAttentionBeside, RanksWithoutTokens) {
  ASSERT_EQ(SequenceLayout(SequenceLayoutKind::kZigzag, 5, 4).Rows(2), 0);
  Recipe recipe = OfDocuments(2);
  recipe.length = 5;
  const Outcome of_five = OneRank(recipe);
  recipe.cp = 4;
  for (const SequenceKind kind :
       {SequenceKind::kTokenRing, SequenceKind::kUlysses, SequenceKind::kHybrid}) {
    recipe.attention = kind;
    Check(recipe, of_five, 4, 3);
  }
  recipe.length = 3;
  recipe.cp = 1;
  recipe.attention = {};
  const Outcome of_three = OneRank(recipe);
  recipe.cp = 5;
  for (int kind = 0; kind < kHybrid; ++kind) {
    recipe.attention = static_cast<SequenceKind>(kind);
    Check(recipe, of_three, 5, 3);
  }
  recipe.attention = {};
  recipe.zero_stage = 3;
  Check(recipe, of_three, 5, 3);
}

// Heads exchanged in pairs of ranks, which have 3 heads and one kv head under tp 2.
TEST(ParityAttentionBeside, HybridWithZeroTensorAndPipelineRanks) {
  Recipe recipe = OfDocuments(4);
  const Outcome one = OneRank(recipe);
  recipe.attention = SequenceKind::kHybrid;
  recipe.cp = 4;
  recipe.zero_stage = 3;
  recipe.recompute = true;
  Check(recipe, one, 4, 3);
  recipe.tp = 2;
  Check(recipe, one, 8, 3);
  recipe.tp = 1;
  recipe.pp = 2;
  recipe.schedule = "zb_h1";
  Check(recipe, one, 8, 3);
  recipe.recompute = false;
  recipe.zero_stage = 1;
  Check(recipe, one, 8, 3);
}

TEST(LongParityAttentionBeside, HybridOfAllSizesOnSixteenRanks) {
  Recipe recipe = OfDocuments(4);
  const Outcome one = OneRank(recipe);
  recipe.attention = SequenceKind::kHybrid;
  recipe.zero_stage = 3;
  for (const auto& [cp, ulysses] : {std::pair{8, 2}, {8, 4}, {4, 2}}) {
    recipe.cp = cp;
    recipe.ulysses = ulysses;
    recipe.tp = 2;
    recipe.pp = 8 / cp;
    for (const bool recompute : {false, true}) {
      recipe.recompute = recompute;
      recipe.sequence_parallel = !recompute;
      Check(recipe, one, 16, 3);
    }
  }
}

// The planner's ranks send what real ranks send, and a replay sends nothing.
TEST(AttentionBytes, MetaRanksSendWhatRealRanksSend) {
  for (int kind = 0; kind < kSequenceKinds; ++kind) {
    const int cp = kind == kHybrid ? 4 : 3;
    Recipe recipe = {.dtype = DType::kF32, .length = 13, .cp = cp};
    recipe.attention = static_cast<SequenceKind>(kind);
    std::array<int64_t, 4> sent = {}, again = {};
    for (const bool recompute : {false, true}) {
      recipe.recompute = recompute;
      RunThreadRanks(cp, 1, [&](Communicator& c) {
        TrainingStep step(Options(recipe), c);
        step.Run(Batches(recipe, step, 0, 3, InOrder()), recipe.lr);
        (recompute ? again : sent)[static_cast<size_t>(c.rank())] = step.wire_bytes(MeshAxis::kCp);
      });
    }
    EXPECT_EQ(sent, again) << Name(*recipe.attention);
    for (int r = 0; r < cp; ++r) {
      ExecutionContext context(Device{DeviceType::kMeta});
      const ContextScope scope(context);
      const auto meta = MakeMetaCommunicator(r, cp);
      TrainingStep step(Options(recipe), *meta);
      step.Run(Batches(recipe, step, 0, 3, InOrder()), recipe.lr);
      EXPECT_EQ(step.wire_bytes(MeshAxis::kCp), sent[static_cast<size_t>(r)])
          << Name(*recipe.attention);
    }
    EXPECT_GT(std::accumulate(sent.begin(), sent.end(), int64_t{0}), 0);
  }
}

}  // namespace
}  // namespace shoal
