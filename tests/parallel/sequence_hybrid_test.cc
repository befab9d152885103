// Groups that exchange heads, and rows between them: exact, checked, counted and timed for every
// size of the groups and every schedule of the rows.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "parallel/sequence_pass.h"
#include "tests/parallel/sequence_case.h"

namespace shoal {
namespace {

using namespace sequence_testing;  // NOLINT: all of it

constexpr SequencePass kPasses[] = {SequencePass::kForward, SequencePass::kBackward};
constexpr std::pair<int, int> kHybridHeads[] = {{8, 8}, {8, 2}, {8, 1}, {6, 3}, {5, 5}};

std::vector<int> Sizes(int ranks) {
  std::vector<int> sizes = SequenceGroupSizes(ranks);
  std::erase_if(sizes, [&](int n) { return n == 1 || n == ranks; });
  return sizes;
}
SequenceMethod Hybrid(int group, int rows) {
  return {Kind::kHybrid, group, static_cast<Kind>(rows)};
}

// The same, and in every second turn both ways where rows can go so.
SequenceMethod Hybrid(int group, int rows, int turn) {
  SequenceMethod method = Hybrid(group, rows);
  method.both_ways = turn % 2 == 0 && CanGoBothWays(method.rows);
  return method;
}

// --- execution -----------------------------------------------------------------------------------

// Both passes of one method on this rank, without the choice that a SequenceGroup makes.
void RunMethod(const Case& c, const SequenceMethod& method, const Whole& w, Communicator& ranks,
               Errors& errors, std::mutex& mutex) {
  SequenceWire wire(ranks);
  const int rank = ranks.rank();
  const SequenceLayout layout(c.layout, c.tokens, ranks.size());
  SequenceMask mask{c.causal(), c.window(), {}};
  if (c.mask == Mask::kPacked) mask.documents = PackedIds(c.batch, c.tokens);
  const SequencePassOptions options{1 / std::sqrt(static_cast<double>(c.head_dim)), c.wide_results};
  const SequenceWidths widths = WidthsOf(c.batch, c.head_dim, c.dtype, options);
  SequenceArrays x;
  x.q = Mine(w.q, layout, rank);
  x.k = Mine(w.k, layout, rank);
  x.v = Mine(w.v, layout, rank);
  int64_t sent = 0;
  for (const SequencePass pass : kPasses) {
    const SequenceSchedule schedule = MakeSequenceSchedule(
        method, pass, layout, mask, static_cast<int>(c.heads), static_cast<int>(c.kv_heads));
    if (pass == SequencePass::kBackward) {
      x.q = x.k = x.v = {};  // the shares are kept
      x.dout = Mine(w.dout, layout, rank);
    }
    RunSequencePass(schedule, options, wire, rank, x);
    sent += CountTraffic(schedule, widths).Sent(rank);
    EXPECT_EQ(wire.bytes(), sent) << c.Text(ranks.size());
  }
  const std::lock_guard lock(mutex);
  errors.Add(0, x.out, Mine(w.out, layout, rank));
  errors.Add(1, x.dq, Mine(w.dq, layout, rank));
  errors.Add(2, x.dk, Mine(w.dk, layout, rank));
  errors.Add(3, x.dv, Mine(w.dv, layout, rank));
}

Errors RunMethod(const Case& c, const SequenceMethod& method, int ranks) {
  const Whole whole = MakeWhole(c);
  Errors errors;
  std::mutex mutex;
  RunThreadRanks(ranks, 1,
                 [&](Communicator& comm) { RunMethod(c, method, whole, comm, errors, mutex); });
  return errors;
}

std::vector<int64_t> Lengths(int64_t ranks) { return {1, ranks - 1, ranks, 2 * ranks + 1, 97}; }

class HybridExactness : public ::testing::TestWithParam<int> {};

// Every size of groups x schedule of rows x layout x mask; heads and lengths take turns.
TEST_P(HybridExactness, EqualsOneRank) {
  const int ranks = GetParam();
  int turn = ranks;
  for (const int group : Sizes(ranks))
    for (int rows = 0; rows < kSequenceRowKinds; ++rows)
      for (const Layout layout : kLayouts)
        for (const Mask mask : kMasks) {
          ++turn;
          const auto [heads, kv] = kHybridHeads[turn % 5];
          const Case c{Kind::kHybrid, layout, mask, Lengths(ranks)[(turn / 5) % 5],
                       heads,         kv,     16,   turn % 2 == 0 ? 1 : 2};
          const SequenceMethod method = Hybrid(group, rows, turn);
          EXPECT_LE(RunMethod(c, method, ranks).Worst(), 1e-12)
              << Describe(method, ranks) << ": " << c.Text(ranks);
        }
}
INSTANTIATE_TEST_SUITE_P(Ranks, HybridExactness, ::testing::Values(4));
INSTANTIATE_TEST_SUITE_P(LongRanks, HybridExactness, ::testing::Values(6, 8, 9, 12));

TEST(HybridPasses, SamplesOfMoreRanks) {
  for (const int ranks : {6, 8, 9}) {
    int turn = ranks;
    for (const int group : Sizes(ranks))
      for (int rows = 0; rows < kSequenceRowKinds; ++rows, ++turn) {
        const auto [heads, kv] = kHybridHeads[turn % 5];
        const Case c{Kind::kHybrid,
                     kLayouts[turn % 3],
                     kMasks[turn % 4],
                     2 * ranks + turn,
                     heads,
                     kv,
                     16,
                     1};
        const SequenceMethod method = Hybrid(group, rows, turn);
        EXPECT_LE(RunMethod(c, method, ranks).Worst(), 1e-12)
            << Describe(method, ranks) << ": " << c.Text(ranks);
      }
  }
}

class LongHybridExactness : public ::testing::TestWithParam<int> {};

TEST_P(LongHybridExactness, EqualsOneRank) {
  const int ranks = GetParam();
  int turn = 0;
  for (const int group : Sizes(ranks))
    for (const Layout layout : kLayouts)
      for (const Mask mask : kMasks)
        for (const auto& [heads, kv] : kHybridHeads)
          for (const int64_t tokens : Lengths(ranks)) {
            const Case c{Kind::kHybrid, layout, mask, tokens, heads, kv, 16, 2};
            const SequenceMethod method = Hybrid(group, turn % kSequenceRowKinds, turn);
            ++turn;
            ASSERT_LE(RunMethod(c, method, ranks).Worst(), 1e-12)
                << Describe(method, ranks) << ": " << c.Text(ranks);
          }
}
INSTANTIATE_TEST_SUITE_P(LongRanks, LongHybridExactness, ::testing::Values(4, 6, 8, 9));

// Shares of kv heads that several ranks have are summed before they are rounded.
TEST(HybridPasses, HalfPrecisionIsRoundedOnce) {
  for (const int kv : {8, 2, 1}) {
    Case c{Kind::kHybrid, Layout::kZigzag, Mask::kCausal, 96, 8, kv, 64, 1};
    c.dtype = DType::kBF16;
    const Errors alone = RunCase({Kind::kTokenRing,
                                  c.layout,
                                  c.mask,
                                  c.tokens,
                                  c.heads,
                                  c.kv_heads,
                                  c.head_dim,
                                  c.batch,
                                  1,
                                  {},
                                  c.dtype},
                                 1);
    const Errors many = RunMethod(c, Hybrid(4, 0), 8);
    for (const int i : {0, 1, 2, 3})
      EXPECT_LE(many.Relative(i), 1.1 * alone.Relative(i)) << i << " kv " << kv;
  }
}

TEST(HybridGroup, ChoosesRowsAndSizes) {
  for (const int ulysses : {0, 2, 4}) {
    Case c{Kind::kHybrid, Layout::kZigzag, Mask::kPacked, 61, 8, 4, 16, 2};
    c.ulysses = ulysses;
    EXPECT_LE(RunCase(c, 8).Worst(), 1e-12) << ulysses;
  }
}

TEST(HybridGroup, RefusesBeforeAnyRankCommunicates) {
  RunThreadRanks(6, 1, [](Communicator& ranks) {
    const auto complaint = [&](SequenceOptions options) -> std::string {
      if (ranks.rank() > 0) return "";  // the others need not take part
      try {
        SequenceGroup(options, ranks);
      } catch (const Error& e) {
        EXPECT_EQ(e.kind(), ErrorKind::kConfig);
        return e.message();
      }
      return "nothing";
    };
    SequenceOptions options;
    options.schedule = Kind::kHybrid;
    options.ulysses = 4;
    const std::string said = complaint(options);
    options.ulysses = 2;
    options.backward = Kind::kUlysses;
    const std::string of_backward = complaint(options);
    if (ranks.rank() > 0) return;
    EXPECT_THAT(said, ::testing::HasSubstr("set it to one of 2, 3"));
    EXPECT_THAT(of_backward, ::testing::HasSubstr("both to hybrid"));
  });
  for (const int ranks : {1, 2, 3, 7}) EXPECT_THROW(HybridGroups(ranks, 0), Error) << ranks;
  EXPECT_EQ(HybridGroups(12, 0), (std::vector{2, 3, 4, 6}));
  EXPECT_EQ(HybridGroups(12, 3), std::vector{3});
}

// --- schedules -----------------------------------------------------------------------------------

TEST(HybridLayouts, GroupsHaveTheirRanksRows) {
  for (const int ranks : {1, 4, 6, 8, 9})
    for (const int64_t tokens : {0, 1, 5, 8, 17, 97})
      for (const Layout kind : kLayouts)
        for (const int group : SequenceGroupSizes(ranks)) {
          const SequenceLayout layout(kind, tokens, ranks), groups = layout.Groups(group);
          ASSERT_EQ(groups.ranks(), ranks / group);
          EXPECT_EQ(groups.tokens(), tokens);
          for (int g = 0; g < groups.ranks(); ++g) {
            std::vector<int64_t> all, own = groups.Tokens(g);
            for (int r = g * group; r < (g + 1) * group; ++r)
              for (const int64_t token : layout.Tokens(r)) all.push_back(token);
            EXPECT_EQ(std::ssize(own), groups.Rows(g));
            for (int64_t i = 0; i < std::ssize(own); ++i)
              EXPECT_EQ(groups.Place(own[static_cast<size_t>(i)]), std::pair(g, i));
            std::ranges::sort(all);
            std::ranges::sort(own);
            EXPECT_EQ(own, all);
            // What is balanced for fewer ranks stays so: parts that lie together are one.
            if (kind == Layout::kStriped) continue;
            const SequenceLayout fewer(kind, tokens, ranks / group);
            EXPECT_EQ(groups.Tokens(g), fewer.Tokens(g));
            EXPECT_EQ(groups.ranges(g).size(), fewer.ranges(g).size());
          }
        }
}

TEST(HybridShares, HaveWholeKvHeadsOrPartOfOne) {
  for (const int ranks : {1, 2, 3, 4, 5, 8, 16})
    for (const auto& [heads, kv] : {std::pair{8, 8}, {8, 2}, {8, 1}, {6, 3}, {5, 5}, {12, 4}}) {
      const SequenceSchedule s = MakeSequenceSchedule({Kind::kUlysses}, SequencePass::kForward,
                                                      {Layout::kZigzag, 8, ranks}, {}, heads, kv);
      int next = 0, most = 0;
      bool shared = false;
      for (int r = 0; r < ranks; ++r) {
        const SequenceSchedule::Heads share = s.Share(r);
        if (share.empty()) continue;
        EXPECT_EQ(share.begin, next);
        next = share.end;
        most = std::max(most, share.end - share.begin);
        const int mine = s.KvEnd(share.end) - s.KvBegin(share.begin);
        EXPECT_EQ((share.end - share.begin) % mine, 0);
        if (mine > 1) {
          EXPECT_EQ((share.end - share.begin) / mine, heads / kv);
        }
        shared |= share.begin % (heads / kv) != 0;
      }
      EXPECT_EQ(next, heads);
      EXPECT_EQ(s.SharesKvHeads(), shared);
      EXPECT_LE(most, kv >= ranks ? (kv + ranks - 1) / ranks * (heads / kv)
                                  : (heads / kv + ranks / kv - 1) / (ranks / kv));
    }
}

struct Draw {
  std::mt19937 random;
  int operator()(int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); }
};

SequenceSchedule RandomSchedule(Draw& draw) {
  constexpr int kRanks[] = {1, 2, 3, 4, 6, 8, 9, 12};
  const int ranks = kRanks[draw(8)];
  const std::vector<int> sizes = SequenceGroupSizes(ranks);
  const int64_t tokens = 1 + draw(40);
  SequenceMask mask{.causal = draw(2) == 0, .window = draw(3) == 0 ? 1 + draw(12) : 0};
  if (draw(3) == 0) mask.documents = PackedIds(1 + draw(2), tokens);
  const auto [heads, kv] = kHybridHeads[draw(5)];
  SequenceMethod method = Hybrid(sizes[static_cast<size_t>(draw(static_cast<int>(sizes.size())))],
                                 draw(kSequenceRowKinds));
  method.both_ways = draw(2) == 0 && CanGoBothWays(method.rows);
  return MakeSequenceSchedule(method, kPasses[draw(2)], {kLayouts[draw(3)], tokens, ranks}, mask,
                              heads, kv);
}

bool Passes(const SequenceSchedule& schedule) {
  try {
    CheckSequenceSchedule(schedule);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kConfig);
    return false;
  }
  return true;
}

// One action dropped, done twice, or of other heads, rows or ranks.
void Mutate(Draw& draw, SequenceSchedule& s, int rank, std::string& what) {
  auto& list = s.actions[static_cast<size_t>(rank)];
  const int i = draw(static_cast<int>(list.size()));
  SequenceAction& a = list[static_cast<size_t>(i)];
  what = fmt::format("rank {} action {} ({})", rank, i + 1, ActionText(a));
  switch (draw(6)) {
    case 0:
      list.erase(list.begin() + i);
      break;
    case 1:
      list.insert(list.begin() + i, SequenceAction(a));
      break;
    case 2:
      ++a.head_end;
      break;
    case 3:
      --a.rows[0].count;
      break;
    case 4:
      ++a.head_begin;
      break;
    case 5:
      a.owner = (a.owner + 1) % s.ranks();
      if (s.ranks() == 1) ++a.rows[0].count;
      break;
  }
}

void CheckRandom(int count, uint32_t seed) {
  Draw draw{std::mt19937(seed)};
  int refused = 0;
  for (int i = 0; i < count; ++i) {
    SequenceSchedule s = RandomSchedule(draw);
    ASSERT_TRUE(Passes(s)) << WriteSequenceSchedule(s);
    std::vector<int> busy;
    for (int r = 0; r < s.ranks(); ++r)
      if (!s.actions[static_cast<size_t>(r)].empty()) busy.push_back(r);
    std::string what;
    Mutate(draw, s, busy[static_cast<size_t>(draw(static_cast<int>(busy.size())))], what);
    ASSERT_FALSE(Passes(s)) << what << "\n" << WriteSequenceSchedule(s);
    ++refused;
  }
  EXPECT_EQ(refused, count);
}
TEST(HybridSchedules, RandomOnesAreWholeAndMutatedOnesRefused) { CheckRandom(400, 1); }
TEST(LongHybridSchedules, RandomOnesAreWholeAndMutatedOnesRefused) { CheckRandom(10000, 2); }

TEST(HybridSchedules, SayWhatTheyAre) {
  const SequenceSchedule s = MakeSequenceSchedule(Hybrid(2, 0), SequencePass::kForward,
                                                  {Layout::kContiguous, 4, 4}, {}, 2, 2);
  EXPECT_THAT(
      WriteSequenceSchedule(s),
      ::testing::StartsWith("# hybrid (2 x 2, token_ring) forward, contiguous layout, 4 tokens\n"
                            "0: send heads of 0 to 1 0:[0, 1) heads [1, 2), "
                            "receive heads of 1 from 1 0:[0, 1) heads [0, 1), "
                            "tile 0 0:[0, 1) x 0 0:[0, 1) heads [0, 1), "
                            "receive query of 1 from 2 0:[0, 2) heads [0, 1)"));
}

// --- bytes ---------------------------------------------------------------------------------------

// Of full attention, summed over the ranks: (U-1)/U of what each rank has of all heads, twice, and
// R-1 messages of as much of rows, of a share's heads. kv heads that shares have in common go to
// each of them: a share's K has U rows of a kv head where its Q has U rows of 1/U of the heads.
TEST(HybridBytes, HaveTheClosedForm) {
  constexpr int64_t kRows = 12;  // per rank
  using enum SequenceTag;
  for (const int ranks : {4, 6, 8, 9, 16})
    for (const int group : Sizes(ranks))
      for (const auto& [heads, kv] : {std::pair{48, 48}, {48, 24}, {24, 2}, {24, 1}})
        for (const Layout layout : kLayouts)
          for (int rows = 0; rows < kSequenceRowKinds; ++rows) {
            if (kv >= group ? kv % group != 0 : group % kv != 0 || heads % group != 0) continue;
            const SequenceWidths w{.batch = 3, .head_dim = 64};
            const int64_t p = ranks, u = group, r = p / u;
            const int64_t q = w.batch * kRows * heads * w.head_dim, l = q / w.head_dim;
            // Of a share: its K of one rank's rows, times U.
            const int64_t k = u * w.batch * kRows * std::max<int64_t>(1, kv / u) * w.head_dim;
            const bool shared = kv < group;
            const Kind kind = static_cast<Kind>(rows);
            const bool queries = kind == Kind::kTokenRing || kind == Kind::kTokenRingRelay ||
                                 kind == Kind::kTokenRingLagged;
            const auto count = [&, heads = heads, kv = kv](SequencePass pass) {
              return CountTraffic(
                  MakeSequenceSchedule(Hybrid(group, rows), pass, {layout, p * kRows, ranks},
                                       {.causal = false}, heads, kv),
                  w);
            };
            std::array<int64_t, kSequenceTags> want = {};
            const auto add = [&](SequenceTag tag, int64_t elements, int64_t bytes) {
              want[static_cast<size_t>(tag)] += elements * bytes;
            };
            const auto compare = [&, kv = kv](const SequenceTraffic& t) {
              for (int tag = 0; tag < kSequenceTags; ++tag)
                EXPECT_EQ(t.Total(static_cast<SequenceTag>(tag)), want[static_cast<size_t>(tag)])
                    << Name(static_cast<SequenceTag>(tag)) << " "
                    << Describe(Hybrid(group, rows), ranks) << " kv " << kv;
              want = {};
            };
            const int64_t there = p * (u - 1) * q / u, there_kv = p * (u - 1) * k / u,
                          ring = p * (r - 1);
            add(kQ, there, 2);
            add(kK, there_kv, 2);
            add(kV, there_kv, 2);
            add(kO, there, 2);
            if (queries) {
              add(kQ, ring * q, 2);
              add(kO, ring * q, kind == Kind::kTokenRingLagged ? 4 : 2);
              add(kLse, ring * l, 4);
            } else {
              add(kK, ring * k, 2);
              add(kV, ring * k, 2);
            }
            compare(count(SequencePass::kForward));
            add(kDO, there, 2);
            add(kDQ, there, 2);
            add(kDK, there_kv, shared ? 4 : 2);
            add(kDV, there_kv, shared ? 4 : 2);
            if (queries) {
              add(kQ, ring * q, 2);
              add(kDO, ring * q, 2);
              add(kLse, ring * l, 4);
              add(kDelta, ring * l, 4);
              add(kDQ, ring * q, 4);
            } else {
              add(kK, ring * k, 2);
              add(kV, ring * k, 2);
              add(kDK, ring * k, 4);
              add(kDV, ring * k, 4);
            }
            compare(count(SequencePass::kBackward));
          }
}

// --- time ----------------------------------------------------------------------------------------

TEST(HybridSimulator, FollowsTheTimeModel) {
  int compared = 0;
  for (const int ranks : {4, 6, 8, 9, 16})
    for (const int group : Sizes(ranks))
      for (const auto& [heads, kv] : {std::pair{48, 48}, {48, 24}})
        for (const SequenceFabric fabric : {SequenceFabric::kMesh, SequenceFabric::kPort})
          for (const double flops : {1e9, 1e11, 1e12, 3e12, 1e13, 1e30})
            for (const double latency : {0.0, 1e-4})
              for (const SequencePass pass : kPasses)
                for (int rows = 0; rows < kSequenceRowKinds; ++rows) {
                  const SequenceSchedule s = MakeSequenceSchedule(
                      Hybrid(group, rows), pass, {Layout::kContiguous, 256 * ranks, ranks},
                      {.causal = false}, heads, kv);
                  const SequenceWidths widths{.batch = 1, .head_dim = 128};
                  const SequenceMachine machine{fabric, flops, 1e9, latency};
                  const double model = SequenceTimeModel(s, widths, machine);
                  if (model < 0) continue;
                  ++compared;
                  EXPECT_NEAR(SimulateSequence(s, widths, machine).seconds, model, 0.01 * model)
                      << Describe(s.method, ranks) << " " << Name(pass) << " " << Name(fabric)
                      << " heads " << heads << "/" << kv << " flops " << flops << " latency "
                      << latency;
                }
  EXPECT_GT(compared, 1000);
}

// Eight ranks on one port each: what all heads of all rows would take P-1 messages for.
TEST(HybridChoice, IsChosenWhereItIsFastest) {
  const SequenceLayout layout(Layout::kZigzag, 8 * 512, 8);
  const SequenceWidths widths{.batch = 1, .head_dim = 128};
  int hybrids = 0;
  for (const SequenceFabric fabric :
       {SequenceFabric::kRing, SequenceFabric::kMesh, SequenceFabric::kPort})
    for (const int kv : {32, 8, 4, 2})
      for (const double flops : {1e12, 3e13}) {
        const SequenceMachine machine{fabric, flops, 1e10, 5e-6};
        const SequenceChoice choice =
            ChooseSequence(layout, {}, 32, kv, widths, machine, SequenceGroupSizes(8));
        EXPECT_THAT(choice.reason, ::testing::HasSubstr("hybrid (2 x 4, "));
        EXPECT_THAT(choice.reason, ::testing::HasSubstr("hybrid (4 x 2, "));
        hybrids += choice.forward.kind == Kind::kHybrid;
        EXPECT_EQ(choice.forward.kind == Kind::kHybrid, choice.backward.kind == Kind::kHybrid);
      }
  EXPECT_GT(hybrids, 0);
}

// Started as `mpirun -n 4 parallel_test --gtest_filter=Mpi.*`; see CMakeLists.txt here.
TEST(Mpi, HybridAttention) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) GTEST_SKIP() << "not started by mpirun";
  const auto ranks = MakeMpiCommunicator();
  SetThreadRank(ranks->rank());
  if (Sizes(ranks->size()).empty()) GTEST_SKIP() << "no groups of several among these ranks";
  for (const int group : Sizes(ranks->size()))
    for (int rows = 0; rows < kSequenceRowKinds; ++rows)
      for (const Mask mask : kMasks) {
        const Case c{Kind::kHybrid, kLayouts[rows % 3], mask, 61, 8, 2, 64, 2};
        Errors errors;
        std::mutex mutex;
        RunMethod(c, Hybrid(group, rows), MakeWhole(c), *ranks, errors, mutex);
        EXPECT_LE(errors.Worst(), 1e-12) << Describe(Hybrid(group, rows), ranks->size());
      }
}

}  // namespace
}  // namespace shoal
