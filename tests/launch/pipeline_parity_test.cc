// Any schedule over any number of stages computes what one rank does with the whole batch.
#include <gtest/gtest.h>

#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

// A kind with the stages per rank that it takes.
struct Kind {
  const char* schedule;
  int virtual_stages;
};
void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.schedule; }

void Check(const Recipe& recipe, const Outcome& one, int ranks, int64_t micro_batches) {
  SCOPED_TRACE(fmt::format("{} pp {} x {} tp {} zero {} on {} ranks, {} micro-batches",
                           recipe.schedule, recipe.pp, recipe.virtual_stages, recipe.tp,
                           recipe.zero_stage, ranks, micro_batches));
  RunThreadRanks(ranks, 1, [&](Communicator& c) {
    Compare(recipe, one, Train(recipe, c, micro_batches, InOrder()), 1e-10, 1e-10);
  });
}

class ParityPipeline : public ::testing::TestWithParam<std::tuple<std::string, Kind, int>> {};

TEST_P(ParityPipeline, Fp64) {
  const auto [model, kind, pp] = GetParam();
  Recipe recipe = {.model = model, .steps = 4};
  recipe.layers = 6;
  const Outcome one = OneRank(recipe);
  recipe.schedule = kind.schedule;
  recipe.virtual_stages = kind.virtual_stages;
  recipe.pp = pp;
  for (const int64_t micro_batches : {1, 2, 4, 9}) Check(recipe, one, pp, micro_batches);
  for (int stage = 1; stage <= 3; ++stage) {
    recipe.zero_stage = stage;
    Check(recipe, one, 2 * pp, 6);
  }
  recipe.tp = 2;
  Check(recipe, one, 2 * pp, 3);
  recipe.sequence_parallel = true;
  Check(recipe, one, 2 * pp, 3);
}

// What crosses a boundary is rounded as it is within a rank: in f32 and bf16 only the order of sums
// differs.
TEST(ParityPipelinePrecision, Fp32AndBf16) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Recipe recipe = {.model = "llama-gqa-tied", .dtype = dtype, .lr = 1e-3};
    recipe.layers = 6;
    const Outcome one = OneRank(recipe);
    recipe.pp = 3;
    for (const Kind& kind : {Kind{"1f1b", 1}, {"zb_v", 2}}) {
      recipe.schedule = kind.schedule;
      recipe.virtual_stages = kind.virtual_stages;
      RunThreadRanks(3, 1, [&](Communicator& c) {
        const Outcome many = Train(recipe, c, 1, InOrder());
        if (dtype == DType::kF32)
          Compare(recipe, one, many, 1e-5, 1e-4);
        else
          EXPECT_LT(Difference(one.losses, many.losses), 1e-5);
      });
    }
  }
}

constexpr Kind kKinds[] = {
    {"gpipe", 1}, {"1f1b", 1}, {"interleaved", 2}, {"zb_h1", 1}, {"zb_v", 2}};

INSTANTIATE_TEST_SUITE_P(All, ParityPipeline,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::ValuesIn(kKinds),
                                            ::testing::Values(2, 3, 4)));

}  // namespace
}  // namespace shoal
