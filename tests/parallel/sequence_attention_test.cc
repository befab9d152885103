// Sequence-parallel attention equals attention on one rank, forward and backward, and sends what
// its schedule says.
#include <gtest/gtest.h>

#include <cstdlib>
#include <thread>

#include "core/base/mutation.h"
#include "tests/parallel/sequence_case.h"

namespace shoal {
namespace {

using namespace sequence_testing;  // NOLINT: all of it

class SequenceExactness : public ::testing::TestWithParam<int> {};

std::vector<int64_t> Lengths(int64_t ranks) {
  return {1, std::max<int64_t>(1, ranks - 1), ranks, 2 * ranks + 1, 97};
}

// Every schedule x layout x mask; heads, head dims, batches and lengths take turns.
TEST_P(SequenceExactness, EqualsOneRank) {
  const int ranks = GetParam();
  const std::vector<int64_t> lengths = Lengths(ranks);
  int turn = ranks;
  for (const auto& [kind, both_ways] : WaysOf(ranks))
    for (const Layout layout : kLayouts)
      for (const Mask mask : kMasks) {
        ++turn;
        const auto [heads, kv] = kHeads[turn % 4];
        Case c{kind,
               layout,
               mask,
               lengths[static_cast<size_t>(turn) % 5],
               heads,
               kv,
               kHeadDims[turn / 3 % 4],
               turn % 2 == 0 ? 1 : 3};
        c.both_ways = both_ways;
        EXPECT_LE(RunCase(c, ranks).Worst(), 1e-12) << c.Text(ranks);
      }
}

// With fewer tokens every softmax has one key, and dq and dk are zero but for rounding.
TEST_P(SequenceExactness, LogitsOfTenThousand) {
  const int ranks = GetParam();
  int turn = 0;
  for (const auto& [kind, both_ways] : WaysOf(ranks)) {
    Case c{kind, kLayouts[turn % 3], kMasks[turn % 2], 97, 6, 3, 16, 1, 1e4};
    c.both_ways = both_ways;
    ++turn;
    EXPECT_LE(RunCase(c, ranks).Worst(), 1e-10) << c.Text(ranks);
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, SequenceExactness, ::testing::Values(1, 2, 3, 4, 8));
INSTANTIATE_TEST_SUITE_P(LongRanks, SequenceExactness, ::testing::Values(5, 6, 7));

// A backward need not move what the forward moved.
TEST(SequencePasses, MayDiffer) {
  for (const auto& [forward, backward] :
       {std::pair{Kind::kKvRing, Kind::kTokenRing}, {Kind::kTokenRingLagged, Kind::kAllGather}}) {
    const Case c{forward, Layout::kZigzag, Mask::kCausal, 29, 8, 2, 16, 2, 1, backward};
    EXPECT_LE(RunCase(c, 3).Worst(), 1e-12);
  }
  const Case mixed{Kind::kUlysses,  Layout::kZigzag, Mask::kCausal, 29, 8, 2, 16, 2, 1,
                   Kind::kTokenRing};
  EXPECT_THROW(RunCase(mixed, 2), Error);
}

TEST(SequencePasses, SingleAndHalfPrecision) {
  for (const auto& [kind, both_ways] : WaysOf(4)) {
    Case c{kind, Layout::kZigzag, Mask::kPacked, 61, 6, 3, 64, 2};
    c.both_ways = both_ways;
    c.dtype = DType::kF32;
    EXPECT_LE(RunCase(c, 4).Worst(), 1e-6) << c.Text(4);
    c.dtype = DType::kBF16;
    for (const bool wide : {false, true}) {
      c.wide_results = wide;
      EXPECT_LE(RunCase(c, 4).Worst(), 6e-3) << c.Text(4);
    }
  }
}

// Sums are wide wherever they grow, so that more ranks do not mean a larger error.
TEST(SequencePasses, ErrorOfBf16IsFlatInRanks) {
  for (const Kind kind : {Kind::kTokenRing, Kind::kTokenRingLagged, Kind::kKvRing})
    for (const bool wide : {true, false}) {
      Case c{kind, Layout::kZigzag, Mask::kFull, 256, 4, 4, 64, 1, 4};
      c.dtype = DType::kBF16;
      c.wide_results = wide;
      const Errors alone = RunCase(c, 1), many = RunCase(c, 8);
      for (const int i : {0, 1, 2, 3})
        EXPECT_LE(many.Relative(i), (wide ? 1.1 : 1.25) * alone.Relative(i))
            << Name(kind) << " " << i;
    }
}

// --- known bugs ----------------------------------------------------------------------------------

double WithMutation(const Case& c, int ranks, Mutation mutation) {
  active_mutation = mutation;
  const double worst = RunCase(c, ranks).Worst();
  active_mutation = Mutation::kNone;
  return worst;
}

TEST(SequenceMutations, AreNoticed) {
  const auto with = [](Kind kind) {
    return Case{kind, Layout::kZigzag, Mask::kCausal, 48, 4, 2, 16, 1};
  };
  for (const Kind kind : {Kind::kTokenRing, Kind::kKvRing, Kind::kAllGather}) {
    EXPECT_LE(RunCase(with(kind), 4).Worst(), 1e-12);
    EXPECT_GT(WithMutation(with(kind), 4, Mutation::kStatisticsOfTheTile), 1e-3) << Name(kind);
  }
  for (const Kind kind : {Kind::kKvRing, Kind::kKvRingOneWay})
    EXPECT_GT(WithMutation(with(kind), 4, Mutation::kFirstKeysReused), 1e-3) << Name(kind);
  for (const Kind kind : {Kind::kTokenRing, Kind::kTokenRingRelay, Kind::kTokenRingLagged})
    for (const bool both_ways : {false, true}) {
      Case c = with(kind);
      c.both_ways = both_ways;
      EXPECT_GT(WithMutation(c, 4, Mutation::kStatisticsOfTheTile), 1e-3) << Name(kind);
      EXPECT_GT(WithMutation(c, 4, Mutation::kPartMergedTwice), 1e-3) << Name(kind);
    }
}

// Started as `mpirun -n N parallel_test --gtest_filter=Mpi.*`; see CMakeLists.txt here.
TEST(Mpi, SequenceAttention) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) GTEST_SKIP() << "not started by mpirun";
  const auto ranks = MakeMpiCommunicator();
  SetThreadRank(ranks->rank());
  std::mt19937 random(static_cast<uint32_t>(ranks->rank()));
  for (const auto& [kind, both_ways] : WaysOf(ranks->size()))
    for (const Layout layout : kLayouts)
      for (const Mask mask : kMasks) {
        Case c{kind, layout, mask, 61, 8, 2, 64, 2};
        c.both_ways = both_ways;
        Errors errors;
        std::mutex mutex;
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
        RunRank(c, MakeWhole(c), *ranks, errors, mutex);
        EXPECT_LE(errors.Worst(), 1e-12) << c.Text(ranks->size());
      }
}

class LongSequenceExactness : public ::testing::TestWithParam<int> {};

// P x mask x heads x head dim x batch x length with every schedule; of 97 tokens, which take most
// of the time, with every fourth one, another for each of the rest. Layouts take turns.
TEST_P(LongSequenceExactness, EqualsOneRank) {
  const int ranks = GetParam();
  size_t turn = 0;
  for (const Mask mask : kMasks)
    for (const auto& [heads, kv] : kHeads)
      for (const int64_t head_dim : kHeadDims)
        for (const int64_t batch : {1, 3})
          for (const int64_t tokens : Lengths(ranks)) {
            Case c{{}, {}, mask, tokens, heads, kv, head_dim, batch};
            const Whole whole = MakeWhole(c);
            size_t way = turn++;
            for (const auto& [kind, both_ways] : WaysOf(ranks)) {
              c.kind = kind;
              c.both_ways = both_ways;
              c.layout = kLayouts[++way % 3];
              if (tokens == 97 && way % 4 != 0) continue;
              ASSERT_LE(RunCase(c, whole, ranks).Worst(), 1e-12) << c.Text(ranks);
            }
          }
}

// Every schedule; the rest takes turns.
TEST_P(LongSequenceExactness, OfAThousandTokens) {
  const int ranks = GetParam();
  size_t turn = static_cast<size_t>(ranks);
  for (const auto& [kind, both_ways] : WaysOf(ranks)) {
    ++turn;
    const auto [heads, kv] = kHeads[turn / 4 % 4];
    Case c{kind, kLayouts[turn % 3],      kMasks[turn % 4],     1000, heads,
           kv,   kHeadDims[turn / 2 % 4], turn % 5 == 0 ? 3 : 1};
    c.both_ways = both_ways;
    ASSERT_LE(RunCase(c, ranks).Worst(), 1e-12) << c.Text(ranks);
  }
}

// In documents of a few tokens nearly every query has one key that counts, and what is left of dq
// and dk is small beside the terms whose difference it is. One rank in f64 differs from 80 bits by
// 1e-12 to 6e-4 as well, as the numbers are drawn.
TEST_P(LongSequenceExactness, LogitsOfTenThousand) {
  const int ranks = GetParam();
  size_t turn = 0;
  for (const auto& [kind, both_ways] : WaysOf(ranks))
    for (const Mask mask : kMasks)
      for (const int64_t head_dim : kHeadDims) {
        const auto [heads, kv] = kHeads[++turn % 4];
        Case c{kind, kLayouts[turn % 3], mask, 97, heads, kv, head_dim, 1, 1e4};
        c.both_ways = both_ways;
        EXPECT_LE(RunCase(c, ranks).Worst(), mask == Mask::kPacked ? 1e-9 : 1e-10) << c.Text(ranks);
      }
}

INSTANTIATE_TEST_SUITE_P(LongRanks, LongSequenceExactness, ::testing::Range(1, 9));

}  // namespace
}  // namespace shoal
