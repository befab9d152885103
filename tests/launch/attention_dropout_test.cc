// Dropout of attention's probabilities trains alike on any layout: its mask knows no rank.
#include <gtest/gtest.h>

#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

Recipe Dropped(const std::string& model) {
  Recipe recipe = {.model = model, .length = 13, .steps = 2, .documents = true, .dropout = 0.1};
  recipe.attention_dropout = 0.3;
  return recipe;
}

std::vector<Layout> Layouts() {
  std::vector<Layout> layouts = {
      {"accumulation", 1, [](Recipe&) {}, 4},
      {"dp 3", 3, [](Recipe&) {}},
      {"zero 3, full recompute", 3,
       [](Recipe& r) {
         r.zero_stage = 3;
         r.recompute = true;
       },
       3},
      {"tp 2, selective recompute", 2,
       [](Recipe& r) {
         r.tp = 2;
         r.selective = true;
       },
       3},
      {"tp 3", 3, [](Recipe& r) { r.tp = 3; }, 3},
      {"tp 4 and sequence-parallel norms", 4,
       [](Recipe& r) {
         r.tp = 4;
         r.sequence_parallel = true;
       },
       3},
      {"pp 2", 2,
       [](Recipe& r) {
         r.pp = 2;
         r.schedule = "zb_h1";
       },
       3},
      {"cp 2, tp 2, pp 2", 8,
       [](Recipe& r) {
         r.cp = r.tp = r.pp = 2;
         r.recompute = true;
       },
       3},
  };
  for (int kind = 0; kind < kSequenceKinds; ++kind) {
    const bool hybrid = static_cast<SequenceKind>(kind) == SequenceKind::kHybrid;
    for (const auto layout : {SequenceLayoutKind::kZigzag, SequenceLayoutKind::kStriped})
      layouts.push_back({fmt::format("{} {}", Name(static_cast<SequenceKind>(kind)), Name(layout)),
                         hybrid ? 4 : 3,
                         [=](Recipe& r) {
                           r.cp = hybrid ? 4 : 3;
                           r.attention = static_cast<SequenceKind>(kind);
                           r.layout = layout;
                           r.recompute = layout == SequenceLayoutKind::kStriped;
                         },
                         3});
  }
  return layouts;
}

// Every `step`-th layout.
void CheckLayouts(const char* model, size_t step) {
  const Recipe recipe = Dropped(model);
  const Outcome one = OneRank(recipe);
  Recipe without = recipe;
  without.attention_dropout = 0;
  EXPECT_GT(Difference(one.losses, OneRank(without).losses), 1e-4);
  CompareLayouts(recipe, one, Layouts(), step);
}

TEST(ParityAttentionDropout, AnyLayout) { CheckLayouts("llama-gqa-tied", 1); }
TEST(ParityAttentionDropout, Gpt2) { CheckLayouts("gpt2", 4); }
TEST(LongParityAttentionDropout, Gpt2OnAnyLayout) { CheckLayouts("gpt2", 1); }

// By a zigzag the third of four ranks has none of five tokens, and yet works on its heads.
TEST(ParityAttentionDropout, ARankWithoutTokens) {
  Recipe recipe = Dropped("llama-gqa-tied");
  recipe.length = 5;
  const Outcome one = OneRank(recipe);
  recipe.cp = 4;
  recipe.attention = SequenceKind::kHybrid;
  RunThreadRanks(4, 1, [&](Communicator& c) {
    Compare(recipe, one, Train(recipe, c, 3, InOrder()), 1e-10, 1e-10);
  });
}

TEST(AttentionDropout, ActsInTrainingAlone) {
  Recipe recipe = Dropped("gpt2");
  std::vector<double> losses;
  for (const double p : {0.0, 0.3}) {
    recipe.attention_dropout = p;
    RunThreadRanks(1, 1, [&](Communicator& c) {
      TrainingStep step(Options(recipe), c);
      losses.push_back(step.SumLoss(Batches(recipe, step, 0, 1, InOrder())[0]));
    });
  }
  EXPECT_EQ(losses[0], losses[1]);
}

// A replay draws what the first forward drew, and bf16 masks what f64 does.
TEST(AttentionDropout, RecomputedBitForBit) {
  Recipe recipe = Dropped("llama-gqa-tied");
  recipe.dtype = DType::kBF16;
  const Measured plain = TrainOn(recipe, 1, 1);
  recipe.recompute = true;
  EXPECT_EQ(plain.outcome.parameters, TrainOn(recipe, 1, 1).outcome.parameters);
}

}  // namespace
}  // namespace shoal
