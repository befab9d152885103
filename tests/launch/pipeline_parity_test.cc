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

constexpr Kind kKinds[] = {
    {"gpipe", 1}, {"1f1b", 1}, {"interleaved", 2}, {"zb_h1", 1}, {"zb_v", 2}};

INSTANTIATE_TEST_SUITE_P(All, ParityPipeline,
                         ::testing::Combine(::testing::Values("llama", "llama-gqa-tied", "gpt2"),
                                            ::testing::ValuesIn(kKinds),
                                            ::testing::Values(2, 3, 4)));

}  // namespace
}  // namespace shoal
