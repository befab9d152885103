// Layouts and schedules of sequence parallelism, without running ranks.
#include "parallel/sequence_schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "core/base/error.h"

namespace shoal {
namespace {

using Kind = SequenceKind;
using Layout = SequenceLayoutKind;

constexpr Layout kLayouts[] = {Layout::kContiguous, Layout::kZigzag, Layout::kStriped};
constexpr SequencePass kPasses[] = {SequencePass::kForward, SequencePass::kBackward};
// All but hybrid; see sequence_hybrid_test.cc.
const std::vector<Kind>& Kinds() {
  static const std::vector<Kind> kinds = [] {
    std::vector<Kind> all;
    for (int k = 0; k < kSequenceKinds; ++k)
      if (static_cast<Kind>(k) != Kind::kHybrid) all.push_back(static_cast<Kind>(k));
    return all;
  }();
  return kinds;
}

std::vector<SequenceMask> Masks(int64_t tokens) {
  std::vector<SequenceMask> masks = {{.causal = true}, {.causal = false}};
  for (int64_t w : {int64_t{1}, int64_t{7}, tokens})
    for (bool causal : {true, false}) masks.push_back({.causal = causal, .window = w});
  SequenceMask packed;
  for (int b = 0; b < 2; ++b)
    for (int64_t t = 0; t < tokens; ++t)
      packed.documents.push_back(static_cast<int32_t>(t < 3 ? 0 : 1 + (t + 2 * b) / 9));
  masks.push_back(packed);
  packed.causal = false;
  packed.window = 5;
  masks.push_back(packed);
  return masks;
}

TEST(SequenceLayouts, EveryTokenHasOnePlace) {
  for (int ranks = 1; ranks <= 8; ++ranks)
    for (int64_t tokens : {0, 1, 3, 8, 17, 97})
      for (Layout kind : kLayouts) {
        const SequenceLayout layout(kind, tokens, ranks);
        std::vector<int64_t> all;
        for (int r = 0; r < ranks; ++r) {
          const std::vector<int64_t> own = layout.Tokens(r);
          EXPECT_EQ(std::ssize(own), layout.Rows(r));
          EXPECT_TRUE(std::ranges::is_sorted(own));
          EXPECT_LE(layout.Rows(r), (tokens + ranks - 1) / ranks + 1);
          for (int64_t i = 0; i < std::ssize(own); ++i) {
            EXPECT_EQ(layout.Token(r, i), own[static_cast<size_t>(i)]);
            EXPECT_EQ(layout.Place(own[static_cast<size_t>(i)]), std::pair(r, i));
          }
          all.insert(all.end(), own.begin(), own.end());
        }
        std::ranges::sort(all);
        std::vector<int64_t> expected(static_cast<size_t>(tokens));
        std::iota(expected.begin(), expected.end(), 0);
        EXPECT_EQ(all, expected);
      }
}

// The kernel's mask and the needed rows say what the definition says, pair by pair.
TEST(SequenceLayouts, MasksOfTilesAreThoseOfTheWhole) {
  constexpr int64_t kTokens = 29;
  for (int ranks : {1, 3, 4})
    for (Layout kind : kLayouts)
      for (const SequenceMask& mask : Masks(kTokens)) {
        const SequenceLayout layout(kind, kTokens, ranks);
        for (int a = 0; a < ranks; ++a)
          for (int b = 0; b < ranks; ++b)
            for (const TokenRange& q : layout.ranges(a))
              for (const TokenRange& k : layout.ranges(b)) {
                const auto options = TileMask(q, k, mask);
                const auto rows = NeededRows(q, k, mask, kTokens);
                int64_t pairs = 0;
                for (int64_t i = 0; i < q.count; ++i)
                  for (int64_t j = 0; j < k.count; ++j) {
                    const int64_t x = q.Token(i), y = k.Token(j);
                    const bool sees =
                        (!mask.causal || y <= x) && (mask.window == 0 || y > x - mask.window);
                    pairs += sees;
                    bool kernel = options.has_value();
                    if (kernel && options->causal) kernel = j <= i + options->query_offset;
                    if (kernel && options->window > 0)
                      kernel = j > i + options->query_offset - options->window;
                    EXPECT_EQ(sees, kernel);
                    bool same = mask.documents.empty();
                    for (size_t d = 0; d < mask.documents.size(); d += kTokens)
                      same |= mask.documents[d + static_cast<size_t>(x)] ==
                              mask.documents[d + static_cast<size_t>(y)];
                    if (!sees || !same) continue;
                    ASSERT_TRUE(rows);
                    EXPECT_TRUE(i >= rows->q_first && i < rows->q_first + rows->q_count);
                    EXPECT_TRUE(j >= rows->k_first && j < rows->k_first + rows->k_count);
                  }
                EXPECT_EQ(pairs, VisiblePairs(q, k, mask));
              }
      }
}

class Schedules : public ::testing::TestWithParam<Kind> {};

TEST_P(Schedules, AreWholeAndComeToAnEnd) {
  for (int ranks : {1, 2, 3, 4, 5, 8, 17})
    for (int64_t tokens : {1, 2, 7, 16, 33, 68})
      for (Layout layout : kLayouts)
        for (const SequenceMask& mask : Masks(tokens))
          for (SequencePass pass : kPasses) {
            for (const bool both_ways : {false, true}) {
              SequenceMethod method{GetParam()};
              if (both_ways && !CanGoBothWays(method.kind)) continue;
              method.both_ways = both_ways;
              const SequenceSchedule schedule = MakeSequenceSchedule(
                  method, pass, SequenceLayout(layout, tokens, ranks), mask, 6, 3);
              EXPECT_NO_THROW(CheckSequenceSchedule(schedule)) << WriteSequenceSchedule(schedule);
            }
          }
}

std::string KindName(const ::testing::TestParamInfo<Kind>& info) { return Name(info.param); }
INSTANTIATE_TEST_SUITE_P(All, Schedules, ::testing::ValuesIn(Kinds()), KindName);

SequenceSchedule Make(Kind kind, SequencePass pass, int ranks, int64_t tokens,
                      const SequenceMask& mask, Layout layout, int heads = 8, int kv_heads = 8) {
  return MakeSequenceSchedule({kind}, pass, SequenceLayout(layout, tokens, ranks), mask, heads,
                              kv_heads);
}

std::string Complaint(const SequenceSchedule& schedule) {
  try {
    CheckSequenceSchedule(schedule);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kConfig);
    return e.message();
  }
  return "";
}

TEST(ScheduleChecks, SeeWhatIsWrong) {
  const SequenceSchedule whole =
      Make(Kind::kTokenRing, SequencePass::kForward, 3, 12, {}, Layout::kZigzag);
  const auto find = [](const SequenceSchedule& s, int rank, SequenceOp op) {
    const auto& list = s.actions[static_cast<size_t>(rank)];
    return std::ranges::find(list, op, &SequenceAction::op) - list.begin();
  };
  SequenceSchedule s = whole;
  std::erase_if(s.actions[0], [](const auto& a) { return a.op == SequenceOp::kSend; });
  EXPECT_THAT(Complaint(s), ::testing::HasSubstr("waits for ever"));
  s = whole;
  s.actions[1].erase(s.actions[1].begin() + find(s, 1, SequenceOp::kTile));
  EXPECT_THAT(Complaint(s), ::testing::HasSubstr("visible pairs"));
  s = whole;
  const auto tile = s.actions[1][static_cast<size_t>(find(s, 1, SequenceOp::kTile))];
  s.actions[1].push_back(tile);
  EXPECT_THAT(Complaint(s), ::testing::HasSubstr("overlaps"));
  s = whole;
  const auto merge = find(s, 2, SequenceOp::kMerge);
  s.actions[2].insert(s.actions[2].begin() + merge, s.actions[2][static_cast<size_t>(merge)]);
  EXPECT_THAT(Complaint(s), ::testing::HasSubstr("merged already"));
  s.actions[2].erase(s.actions[2].begin() + merge, s.actions[2].begin() + merge + 2);
  EXPECT_THAT(Complaint(s), ::testing::HasSubstr("is not merged"));
}

// --- bytes ---------------------------------------------------------------------------------------

// Of full attention where P divides the tokens: closed forms, by tag, summed over the ranks.
TEST(SequenceBytes, FullAttentionHasTheClosedForms) {
  constexpr int64_t kRows = 12;  // per rank
  for (int ranks : {1, 2, 4, 8})
    for (auto [heads, kv] : {std::pair{8, 8}, {8, 2}, {8, 1}})
      for (Layout layout : kLayouts) {
        const SequenceWidths w{.batch = 3, .head_dim = 64};
        const int64_t p = ranks, q = w.batch * kRows * heads * w.head_dim, k = q * kv / heads,
                      l = q / w.head_dim;
        const auto count = [&, heads = heads, kv = kv](Kind kind, SequencePass pass) {
          return CountTraffic(
              Make(kind, pass, ranks, ranks * kRows, {.causal = false}, layout, heads, kv), w);
        };
        using enum SequenceTag;
        const auto expect = [&, kv = kv](const SequenceTraffic& t, SequenceTag tag, int64_t bytes) {
          EXPECT_EQ(t.Total(tag), bytes) << Name(tag) << " P=" << ranks << " kv " << kv;
        };
        const int64_t hops = p * (p - 1);
        for (Kind kind : {Kind::kTokenRing, Kind::kTokenRingRelay, Kind::kTokenRingLagged}) {
          SequenceTraffic t = count(kind, SequencePass::kForward);
          expect(t, kQ, hops * q * 2);
          expect(t, kO, hops * q * (kind == Kind::kTokenRingLagged ? 4 : 2));
          expect(t, kLse, hops * l * 4);
          EXPECT_EQ(t.Total(), t.Total(kQ) + t.Total(kO) + t.Total(kLse));
          t = count(kind, SequencePass::kBackward);
          expect(t, kQ, hops * q * 2);
          expect(t, kDO, hops * q * 2);
          expect(t, kLse, hops * l * 4);
          expect(t, kDelta, hops * l * 4);
          expect(t, kDQ, hops * q * 4);
          EXPECT_EQ(t.Total(), hops * (q * 8 + l * 8));  // no dK, no dV
        }
        for (Kind kind : {Kind::kKvRing, Kind::kKvRingOneWay, Kind::kKvDirect, Kind::kAllGather}) {
          SequenceTraffic t = count(kind, SequencePass::kForward);
          expect(t, kK, hops * k * 2);
          expect(t, kV, hops * k * 2);
          EXPECT_EQ(t.Total(), hops * k * 4);
          t = count(kind, SequencePass::kBackward);
          expect(t, kDK, hops * k * 4);
          expect(t, kDV, hops * k * 4);
          EXPECT_EQ(t.Total(), hops * k * 12);
        }
        // (P-1)/P of everything, where the kv heads can be dealt out.
        if (kv % ranks == 0) {
          SequenceTraffic t = count(Kind::kUlysses, SequencePass::kForward);
          EXPECT_EQ(t.Total(), (p - 1) * (2 * q + 2 * k) * 2);
          t = count(Kind::kUlysses, SequencePass::kBackward);
          EXPECT_EQ(t.Total(), (p - 1) * (2 * q + 2 * k) * 2);
        }
      }
}

TEST(SequenceBytes, OfTheWorkedExample) {
  const SequenceWidths f32{.batch = 1, .head_dim = 64, .element = 4, .partial = 4};
  SequenceTraffic t = CountTraffic(Make(Kind::kTokenRing, SequencePass::kForward, 4, 256,
                                        {.causal = false}, Layout::kContiguous),
                                   f32);
  for (int r = 0; r < 4; ++r) {
    EXPECT_EQ(t.Sent(r, SequenceTag::kQ), 393216);
    EXPECT_EQ(t.Sent(r, SequenceTag::kO), 393216);
    EXPECT_EQ(t.Sent(r, SequenceTag::kLse), 6144);
  }
  for (Kind kind : {Kind::kTokenRing, Kind::kTokenRingRelay}) {
    t = CountTraffic(Make(kind, SequencePass::kForward, 4, 256, {}, Layout::kZigzag), f32);
    EXPECT_EQ(t.Total(SequenceTag::kQ), 1179648) << Name(kind);
    EXPECT_EQ(t.Total(SequenceTag::kO), 1179648);
    EXPECT_EQ(t.Total(SequenceTag::kLse), 18432);
  }
}

TEST(SequenceBytes, ZigzagNeedsThreeQuarters) {
  for (int ranks : {2, 4, 8})
    for (Kind kind : Kinds()) {
      if (kind == Kind::kUlysses) continue;
      for (SequencePass pass : kPasses) {
        const auto bytes = [&](bool causal) {
          return CountTraffic(
                     Make(kind, pass, ranks, 32 * ranks, {.causal = causal}, Layout::kZigzag), {})
              .Total();
        };
        EXPECT_EQ(4 * bytes(true), 3 * bytes(false))
            << Name(kind) << " " << Name(pass) << " P=" << ranks;
      }
    }
}

// Bytes to lower ranks and to higher ones. Of widths alike, out and back, the directions are within
// 1.04; of f32 results for bf16 queries only if heads are split.
struct Balance {
  int64_t down, up;
  double ratio() const {
    return static_cast<double>(std::max(down, up)) / static_cast<double>(std::min(down, up));
  }
};
Balance BalanceOf(const SequenceSchedule& schedule, const SequenceWidths& widths) {
  const auto [down, up] = CountDirections(schedule, widths);
  EXPECT_EQ(down + up, CountTraffic(schedule, widths).Total());
  return {down, up};
}
SequenceSchedule BothWays(Kind kind, SequencePass pass, int ranks, int64_t tokens, bool causal,
                          int heads, int kv_heads) {
  SequenceMethod method{kind};
  method.both_ways = true;
  return MakeSequenceSchedule(method, pass, {Layout::kZigzag, tokens, ranks}, {.causal = causal},
                              heads, kv_heads);
}
constexpr Kind kTokenRings[] = {Kind::kTokenRing, Kind::kTokenRingRelay, Kind::kTokenRingLagged};

TEST(SequenceBytes, TokenRingUsesBothDirectionsAlike) {
  for (int64_t d : {64, 80, 128})
    for (int ranks : {2, 4, 8})
      for (bool causal : {true, false})
        for (SequencePass pass : kPasses)
          for (Kind kind : {Kind::kTokenRing, Kind::kTokenRingRelay}) {
            const SequenceSchedule s =
                Make(kind, pass, ranks, 32 * ranks, {.causal = causal}, Layout::kZigzag);
            EXPECT_LE(BalanceOf(s, {.batch = 1, .head_dim = d}).ratio(), 1.04);
            // The forward's results in f32, and the backward's {Q, dO} too.
            const SequenceWidths wide{.batch = 1,
                                      .head_dim = d,
                                      .element = pass == SequencePass::kForward ? 2 : 4,
                                      .partial = 4};
            EXPECT_GT(BalanceOf(s, wide).ratio(), 1.9);
          }
}

// Full attention: half of all bytes each way. So also of a causal mask, where rows go straight.
TEST(SequenceBytes, HeadsInBothDirectionsBalanceThem) {
  for (int64_t d : {64, 128})
    for (auto [heads, kv] : {std::pair{8, 8}, {8, 2}, {8, 4}, {8, 1}, {6, 3}, {2, 1}})
      for (int ranks : {2, 3, 4, 5, 8})
        for (int64_t element : {2, 4})
          for (SequencePass pass : kPasses)
            for (Kind kind : kTokenRings)
              for (bool causal : {false, true}) {
                const SequenceWidths w{.batch = 3, .head_dim = d, .element = element, .partial = 4};
                const SequenceSchedule s =
                    BothWays(kind, pass, ranks, 12 * ranks, causal, heads, kv);
                if (causal && kind != Kind::kTokenRing) continue;
                EXPECT_TRUE(s.method.both_ways);
                const int64_t p = ranks, q = w.batch * 12 * heads * d, l = q / d;
                const int64_t row = pass == SequencePass::kForward ? q * (element + 4) + l * 4
                                                                   : q * (2 * element + 4) + l * 8;
                const int64_t half = p * (p - 1) * row / 2;
                const Balance balance = BalanceOf(s, w);
                EXPECT_EQ(balance.down, causal ? half * 3 / 4 : half) << Name(kind) << ranks;
                EXPECT_EQ(balance.up, balance.down);
              }
}

// From neighbour to neighbour under a causal mask, to the byte. In halves of a rank's rows and
// heads, one that is not mirrored goes down 3/2 P (P-1) times over all ranks, and a mirrored one
// (P-1) (P-2) / 2 times down and (P-1) (P+1) times up. 16/3 of 8 heads would balance 8 ranks: 5 of
// each rank's are nearest to that.
TEST(SequenceBytes, MirroredHeadsOfAZigzagHaveTheClosedForm) {
  constexpr int64_t kHalf = 6;
  for (int64_t d : {64, 128})
    for (auto [heads, kv] : {std::pair{8, 8}, {8, 4}, {8, 2}, {8, 1}, {32, 8}, {12, 12}})
      for (int64_t p : {2, 4, 8})
        for (SequencePass pass : kPasses) {
          const SequenceWidths w{.batch = 3, .head_dim = d, .partial = 4};
          const int64_t all = 3 * p * (p - 1) / 2, same = (p - 1) * (p - 2) / 2,
                        other = (p - 1) * (p + 1);
          const auto apart = [&, heads = heads](int64_t m) {
            return std::abs((heads - m) * all + m * same - m * other);
          };
          int64_t m = 0;
          for (int64_t i = 1; i <= heads; ++i)
            if (apart(i) < apart(m)) m = i;
          const SequenceSchedule s = BothWays(Kind::kTokenRingRelay, pass, static_cast<int>(p),
                                              2 * kHalf * p, true, heads, kv);
          const int64_t row = w.batch * kHalf;
          const int64_t out = row * (pass == SequencePass::kForward ? d * 2 : d * 4 + 8),
                        back = row * (pass == SequencePass::kForward ? d * 4 + 4 : d * 4);
          const int64_t down = (heads - m) * all + m * same, up = m * other;
          const Balance balance = BalanceOf(s, w);
          EXPECT_EQ(balance.down, down * out + up * back) << heads << "/" << kv << " P " << p;
          EXPECT_EQ(balance.up, up * out + down * back) << heads << "/" << kv << " P " << p;
          EXPECT_LE(balance.ratio(), heads == 8 && p == 8 ? 1.044 : 1.04)
              << heads << "/" << kv << " P " << p;
        }
}

// One head cannot be split, and of 3 one goes against two.
TEST(SequenceBytes, WhatCannotBeBalancedSaysSo) {
  for (Kind kind : kTokenRings) {
    EXPECT_FALSE(BothWays(kind, SequencePass::kForward, 4, 48, false, 1, 1).method.both_ways);
    const SequenceSchedule s = BothWays(kind, SequencePass::kForward, 4, 48, false, 3, 1);
    EXPECT_TRUE(s.method.both_ways);
    EXPECT_EQ(Describe(s.method, 4), std::string(Name(kind)) + " both ways");
    if (kind == Kind::kTokenRingLagged) continue;
    EXPECT_NEAR(BalanceOf(s, {.batch = 1, .head_dim = 64, .partial = 4}).ratio(), 1.25, 0.01);
  }
  SequenceMethod method{Kind::kKvRing};
  method.both_ways = true;
  EXPECT_THROW(
      MakeSequenceSchedule(method, SequencePass::kForward, {Layout::kZigzag, 8, 2}, {}, 2, 2),
      Error);
}

// A window needs its halo, from the rank before.
TEST(SequenceBytes, WindowsSendTheHaloOnly) {
  constexpr int64_t kRows = 16, kWindow = 5;
  for (Kind kind : {Kind::kKvRing, Kind::kKvRingOneWay, Kind::kKvDirect, Kind::kAllGather}) {
    const SequenceTraffic t =
        CountTraffic(Make(kind, SequencePass::kForward, 4, 4 * kRows,
                          {.causal = true, .window = kWindow}, Layout::kContiguous),
                     {.batch = 1, .head_dim = 64});
    EXPECT_EQ(t.Total(SequenceTag::kK), 3 * (kWindow - 1) * 8 * 64 * 2) << Name(kind);
    for (int r = 0; r < 3; ++r) EXPECT_EQ(t.Sent(r), t.Total() / 3);
  }
}

TEST(SequenceBytes, DocumentsStayWhereTheyAre) {
  SequenceMask mask;
  for (int64_t t = 0; t < 32; ++t) mask.documents.push_back(static_cast<int32_t>(t / 8));
  for (Kind kind : Kinds()) {
    if (kind == Kind::kUlysses) continue;
    const SequenceSchedule s =
        Make(kind, SequencePass::kBackward, 4, 32, mask, Layout::kContiguous);
    EXPECT_EQ(CountTraffic(s, {}).Total(), 0) << Name(kind);
  }
}

TEST(ScheduleText, SaysWhatHappens) {
  EXPECT_EQ(WriteSequenceSchedule(Make(Kind::kTokenRing, SequencePass::kForward, 2, 8, {},
                                       Layout::kContiguous, 2, 2)),
            "# token_ring forward, contiguous layout, 8 tokens\n"
            "0: tile 0 0:[0, 2) x 0 0:[0, 2) heads [0, 2), "
            "receive query of 1 from 1 0:[0, 4) heads [0, 2), "
            "tile 1 0:[0, 4) x 0 0:[0, 4) heads [0, 2), "
            "send result of 1 to 1 0:[0, 4) heads [0, 2), "
            "tile 0 0:[2, 4) x 0 0:[0, 4) heads [0, 2)\n"
            "1: send query of 1 to 0 0:[0, 4) heads [0, 2), "
            "tile 1 0:[0, 2) x 1 0:[0, 2) heads [0, 2), "
            "tile 1 0:[2, 4) x 1 0:[0, 4) heads [0, 2), "
            "receive result of 1 from 0 0:[0, 4) heads [0, 2), "
            "merge result of 1 0:[0, 4) heads [0, 2)\n");
  for (Kind kind : Kinds()) EXPECT_EQ(ParseSequenceKind(Name(kind)), kind);
  EXPECT_THROW(ParseSequenceKind("ring"), Error);
}

}  // namespace
}  // namespace shoal
