#include "parallel/sequence_schedule.h"

#include <algorithm>

#include "core/base/error.h"
#include "parallel/communicator.h"
#include "parallel/sequence_sets.h"

namespace shoal {
namespace {

using Rows = SequenceRowSet;
using Heads = SequenceSchedule::Heads;

struct Tile {
  SequenceRows q, k;
};

// Heads whose rows go one way, and what comes of them another.
struct Part {
  Heads heads;
  int step;  // +1: to higher ranks
  int back;
};

// Some rows of every owner that travel around the ring, and what has to arrive at which visit.
struct Flow : Part {
  std::vector<std::vector<Rows>> arrive;  // [owner][visit], from visit 1 on; one more, empty
};

// Makes the lists of all ranks, by the schedule's groups. Where the code says rank it means a
// group, for whom the rank at `place_` of it works on its share of the heads.
class Maker {
 public:
  explicit Maker(SequenceSchedule& schedule)
      : s_(schedule), ranks_(schedule.groups.ranks()), per_group_(schedule.per_group()) {
    s_.actions.assign(static_cast<size_t>(s_.ranks()), {});
    tiles_.resize(static_cast<size_t>(ranks_) * static_cast<size_t>(ranks_));
    for (int a = 0; a < ranks_; ++a)
      for (int b = 0; b < ranks_; ++b) MakeTiles(a, b);
  }

  // Between the groups, for each share of the heads. Returns whether heads are mirrored.
  bool MoveRows(SequenceKind kind, bool both_ways) {
    const int ahead = Ahead(ranks_);
    both_ways_ = both_ways;
    for (place_ = 0; place_ < per_group_; ++place_) {
      if (Share().empty()) continue;
      switch (kind) {
        case SequenceKind::kTokenRing:
          Direct(true, ahead);
          break;
        case SequenceKind::kTokenRingRelay:
          Ring(true, false, true);
          break;
        case SequenceKind::kTokenRingLagged:
          Ring(true, true, false);
          break;
        case SequenceKind::kKvRing:
          Ring(false, true, false);
          break;
        case SequenceKind::kKvRingOneWay:
          Ring(false, false, false);
          break;
        case SequenceKind::kKvDirect:
          Direct(false, ahead);
          break;
        case SequenceKind::kAllGather:
          Gathered(ahead);
          break;
        default:  // one group, which has all rows
          for (rank_ = 0; rank_ < ranks_; ++rank_) Self(kWhole);
      }
    }
    return mirrored_;
  }

  // Within the groups: each rank's rows of the heads of each, there or back.
  void ExchangeHeads(SequencePayload payload) {
    const bool back = payload == SequencePayload::kHeadsResult;
    for (rank_ = 0; rank_ < ranks_; ++rank_)
      for (place_ = 0; place_ < per_group_; ++place_) {
        const int rank = Real(rank_);
        const auto message = [&](SequenceOp op, int step, bool mine) {
          const int peer = rank - place_ + (place_ + step + per_group_) % per_group_;
          const int owner = mine ? rank : peer;
          const SequenceSchedule::Heads heads = s_.Share(mine ? peer : rank);
          Message({.op = op,
                   .payload = payload,
                   .peer = peer,
                   .owner = owner,
                   .rows = All(s_.layout, owner),
                   .head_begin = heads.begin,
                   .head_end = heads.end});
        };
        Exchange(
            per_group_, Ahead(per_group_),
            [&](int step) { message(SequenceOp::kSend, -step, !back); },
            [&](int step) { message(SequenceOp::kReceive, step, back); });
      }
  }

 private:
  enum Half { kWhole, kFirstHalf, kSecondHalf };

  // How many steps early rows are sent where they go straight: as many messages, and results that
  // wait for their turn, are held, whatever the number of ranks.
  static int Ahead(int ranks) { return std::clamp(ranks - 2, 1, 2); }

  // Rows go straight to who needs them, and what comes of them straight back. Step s: of rank r's
  // to rank r - s, of mirrored heads to rank r + s. Rows are sent `ahead` steps early, so that as
  // many links are busy.
  void Direct(bool queries, int ahead) {
    const bool back = queries || s_.pass == SequencePass::kBackward;
    std::vector<Part> parts = {{Share(), -1, 1}};
    if (queries)
      if (const Heads mirrored = Mirrored(1, 0, 1); !mirrored.empty()) {
        parts[0].heads.end = mirrored.begin;
        parts.push_back({mirrored, 1, -1});
      }
    for (rank_ = 0; rank_ < ranks_; ++rank_) {
      const auto give = [&](int step) {
        for (const Part& p : parts) {
          const int to = Mod(rank_ + p.step * step);
          if (step < ranks_) Send(p, Out(queries), to, rank_, Needed(queries, rank_, to));
        }
      };
      const auto take_back = [&](int step) {
        for (const Part& p : parts) {
          const int from = Mod(rank_ + p.step * step);
          if (back) ReceiveAndMerge(p, Back(queries), from, rank_, Needed(queries, rank_, from));
        }
      };
      for (int step = 1; step <= ahead + 1; ++step) give(step);
      Self(back ? kFirstHalf : kWhole);
      for (int step = 1; step < ranks_; ++step) {
        if (step > 1) give(step + ahead);
        for (const Part& p : parts) {
          const int owner = Mod(rank_ - p.step * step);
          const Rows& rows = Needed(queries, owner, rank_);
          Receive(p, Out(queries), owner, owner, rows);
          Tiles(p.heads, queries, owner, rows);
          if (back) Send(p, Back(queries), owner, owner, rows);
        }
        if (step > ahead) take_back(step - ahead);
      }
      if (back) Self(kSecondHalf);
      for (int step = std::max(1, ranks_ - ahead); step < ranks_; ++step) take_back(step);
    }
  }

  // Everything is there before anything is computed.
  void Gathered(int ahead) {
    const bool back = s_.pass == SequencePass::kBackward;
    const Part all{Share(), -1, 1};
    for (rank_ = 0; rank_ < ranks_; ++rank_) {
      Exchange(
          ranks_, ahead,
          [&](int step) {
            const int to = Mod(rank_ - step);
            Send(all, Out(false), to, rank_, Needed(false, rank_, to));
          },
          [&](int step) {
            const int from = Mod(rank_ + step);
            Receive(all, Out(false), from, from, Needed(false, from, rank_));
          });
      Self(kWhole);
      for (int step = 1; step < ranks_; ++step)
        Tiles(all.heads, false, Mod(rank_ + step), Needed(false, Mod(rank_ + step), rank_));
      if (!back) continue;
      Exchange(
          ranks_, ahead,
          [&](int step) {
            const int owner = Mod(rank_ + step);
            Send(all, Back(false), owner, owner, Needed(false, owner, rank_));
          },
          [&](int step) {
            const int from = Mod(rank_ - step);
            ReceiveAndMerge(all, Back(false), from, rank_, Needed(false, rank_, from));
          });
    }
  }

  // Rows go from neighbour to neighbour. What comes of them goes straight back to the owner
  // (`straight`), or follows one step behind and is summed on the way, until no later visitor adds
  // to it; then it goes home.
  void Ring(bool queries, bool two_way, bool straight) {
    const bool back = queries || s_.pass == SequencePass::kBackward;
    const std::vector<Flow> flows = Flows(queries, two_way, straight);
    const SequencePayload out = Out(queries), home = Back(queries);
    for (rank_ = 0; rank_ < ranks_; ++rank_) {
      const auto own = static_cast<size_t>(rank_);
      // What this rank's rows gave at their visit `step` comes home.
      const auto take_back = [&](int step) {
        for (const Flow& f : flows) {
          const int from = Mod(rank_ + f.step * step);
          const auto& a = f.arrive[own];
          const auto at = static_cast<size_t>(step);
          ReceiveAndMerge(f, home, from, rank_,
                          straight ? Intersection(Needed(queries, rank_, from), a[at])
                                   : Difference(a[at], a[at + 1]));
        }
      };
      for (const Flow& f : flows) Send(f, out, Mod(rank_ + f.step), rank_, f.arrive[own][1]);
      Self(back ? kFirstHalf : kWhole);
      for (int step = 1; step < ranks_; ++step) {
        const auto at = static_cast<size_t>(step);
        for (const Flow& f : flows) {
          const int owner = Mod(rank_ - f.step * step);
          const auto& a = f.arrive[static_cast<size_t>(owner)];
          Receive(f, out, Mod(rank_ - f.step), owner, a[at]);
          Send(f, out, Mod(rank_ + f.step), owner, a[at + 1]);
        }
        for (const Flow& f : flows) {
          const int owner = Mod(rank_ - f.step * step);
          Tiles(f.heads, queries, owner, f.arrive[static_cast<size_t>(owner)][at]);
        }
        if (!back) continue;
        for (const Flow& f : flows) {
          const int owner = Mod(rank_ - f.step * step);
          const auto& a = f.arrive[static_cast<size_t>(owner)];
          if (straight) {
            Send(f, home, owner, owner, Intersection(Needed(queries, owner, rank_), a[at]));
          } else if (step > 1) {
            ReceiveAndMerge(f, home, Mod(rank_ - f.step), owner, a[at]);
          }
        }
        if (!straight) {
          for (const Flow& f : flows) {
            const int owner = Mod(rank_ - f.step * step);
            Send(f, home, Mod(rank_ + f.step), owner, f.arrive[static_cast<size_t>(owner)][at + 1]);
          }
          for (const Flow& f : flows) {
            const int owner = Mod(rank_ - f.step * step);
            const auto& a = f.arrive[static_cast<size_t>(owner)];
            Send(f, home, owner, owner, Difference(a[at], a[at + 1]));
          }
        }
        if (step > 1) take_back(step - 1);
      }
      if (back) Self(kSecondHalf);
      if (back && ranks_ > 1) take_back(ranks_ - 1);
    }
  }

  // give(step) `ahead` steps before take(step).
  template <class Give, class Take>
  void Exchange(int ranks, int ahead, Give give, Take take) {
    for (int step = 1; step < ranks + ahead; ++step) {
      if (step < ranks) give(step);
      if (step > ahead) take(step - ahead);
    }
  }

  int Real(int group) const { return group * per_group_ + place_; }
  int Mod(int rank) const { return ((rank % ranks_) + ranks_) % ranks_; }
  const std::vector<Tile>& TilesOf(int q_owner, int k_owner) const {
    return tiles_[static_cast<size_t>(q_owner) * static_cast<size_t>(ranks_) +
                  static_cast<size_t>(k_owner)];
  }
  static SequencePayload Out(bool queries) {
    return queries ? SequencePayload::kQuery : SequencePayload::kKeyValue;
  }
  static SequencePayload Back(bool queries) {
    return queries ? SequencePayload::kResult : SequencePayload::kKeyValueGradient;
  }

  void MakeTiles(int a, int b) {
    auto& tiles =
        tiles_[static_cast<size_t>(a) * static_cast<size_t>(ranks_) + static_cast<size_t>(b)];
    const auto q = s_.groups.ranges(a), k = s_.groups.ranges(b);
    for (int i = 0; i < std::ssize(q); ++i)
      for (int j = 0; j < std::ssize(k); ++j)
        if (const auto t = Cut(a, {i, 0, q[static_cast<size_t>(i)].count}, b,
                               {j, 0, k[static_cast<size_t>(j)].count}))
          tiles.push_back(*t);
  }
  // What of these rows matters.
  std::optional<Tile> Cut(int a, const SequenceRows& q, int b, const SequenceRows& k) const {
    if (q.count == 0 || k.count == 0) return std::nullopt;
    const auto rows = NeededRows(s_.Range(a, q), s_.Range(b, k), s_.mask, s_.layout.tokens());
    if (!rows) return std::nullopt;
    return Tile{{q.range, q.first + rows->q_first, rows->q_count},
                {k.range, k.first + rows->k_first, rows->k_count}};
  }

  // The owner's rows that `holder`, who has the other side of the tiles, needs.
  Rows Needed(bool queries, int owner, int holder) const {
    Rows rows;
    for (const Tile& t : queries ? TilesOf(owner, holder) : TilesOf(holder, owner))
      Include(rows, queries ? t.q : t.k);
    return rows;
  }
  Rows All(const SequenceLayout& layout, int owner) const {
    Rows rows;
    const auto ranges = layout.ranges(owner);
    for (int i = 0; i < std::ssize(ranges); ++i)
      rows.push_back({i, 0, ranges[static_cast<size_t>(i)].count});
    return rows;
  }

  // What of `rows` has to arrive at each visit so that all later ones have what they need.
  std::vector<Rows> Arrivals(bool queries, int owner, int step, const Rows& rows) const {
    std::vector<Rows> arrive(static_cast<size_t>(ranks_) + 1);
    for (int visit = ranks_ - 1; visit > 0; --visit) {
      auto& here = arrive[static_cast<size_t>(visit)];
      here = arrive[static_cast<size_t>(visit) + 1];
      for (const SequenceRows& r :
           Intersection(Needed(queries, owner, Mod(owner + step * visit)), rows))
        Include(here, r);
    }
    return arrive;
  }
  int64_t Hops(bool queries, int owner, int step, const Rows& rows) const {
    int64_t hops = 0;
    for (const Rows& here : Arrivals(queries, owner, step, rows)) hops += Count(here);
    return hops;
  }
  Flow MakeFlow(bool queries, const Part& part, const std::vector<Rows>& rows) const {
    Flow flow{part, {}};
    for (int owner = 0; owner < ranks_; ++owner)
      flow.arrive.push_back(Arrivals(queries, owner, part.step, rows[static_cast<size_t>(owner)]));
    return flow;
  }

  std::vector<Flow> Flows(bool queries, bool two_way, bool straight) {
    std::vector<Rows> all;
    int64_t up = 0, down = 0;
    for (int owner = 0; owner < ranks_; ++owner) {
      all.push_back(All(s_.groups, owner));
      up += Hops(queries, owner, 1, all.back());
      down += Hops(queries, owner, -1, all.back());
    }
    const int step = up < down ? 1 : -1, back = straight ? -1 : 1;
    if (queries && both_ways_)
      if (auto flows = WaysByHeads(step, back, all); !flows.empty()) return flows;
    if (two_way) return WaysByRows(queries);
    return {MakeFlow(queries, {Share(), step, step * back}, all)};
  }

  // Some heads' queries one way. Of the mirrored ones' what has no longer a way by the other goes
  // by that, and the rest as all of the others.
  std::vector<Flow> WaysByHeads(int step, int back, const std::vector<Rows>& all) {
    std::vector<Rows> other(all.size()), same(all.size());
    int64_t hops_same = 0, hops_other = 0;
    for (int owner = 0; owner < ranks_; ++owner)
      for (const SequenceRows& range : all[static_cast<size_t>(owner)]) {
        const int64_t s = Hops(true, owner, step, {range}), o = Hops(true, owner, -step, {range});
        (o > s ? hops_same : hops_other) += std::min(s, o);
        (o > s ? same : other)[static_cast<size_t>(owner)].push_back(range);
      }
    const Heads mirrored = Mirrored(hops_same + hops_other, hops_same, hops_other);
    if (mirrored.empty()) return {};
    const Heads rest{Share().begin, mirrored.begin};
    std::vector<Flow> flows = {MakeFlow(true, {mirrored, -step, -step * back}, other),
                               MakeFlow(true, {mirrored, step, step * back}, same)};
    if (!rest.empty()) flows.push_back(MakeFlow(true, {rest, step, step * back}, all));
    return flows;
  }

  // Heads of the share, the last ones: of each `other` rows go the other way and `same` as all of
  // the rest's. As many as bring the directions nearest to each other; keys stay where they are, so
  // that heads of one kv head may go different ways.
  Heads Mirrored(int64_t all, int64_t same, int64_t other) {
    const Heads share = Share();
    const int heads = share.end - share.begin;
    const auto apart = [&](int n) { return std::abs((heads - n) * all + n * same - n * other); };
    int n = 0;
    while (both_ways_ && ranks_ > 1 && n < heads && apart(n + 1) < apart(n)) ++n;
    mirrored_ = mirrored_ || n > 0;
    return {share.end - n, share.end};
  }

  // A range goes where it has less far; where that is equal, a part each way, so that as many rows
  // of an owner set out in both: the first step is the longest.
  std::vector<Flow> WaysByRows(bool queries) const {
    std::vector<Rows> up(static_cast<size_t>(ranks_)), down = up;
    for (int owner = 0; owner < ranks_; ++owner) {
      const auto o = static_cast<size_t>(owner);
      Rows either;
      for (const SequenceRows& range : All(s_.groups, owner)) {
        const int64_t u = Hops(queries, owner, 1, {range}), d = Hops(queries, owner, -1, {range});
        if (u == 0 && d == 0) continue;
        (u < d ? up[o] : d < u ? down[o] : either).push_back(range);
      }
      const int64_t free = Count(either);
      int64_t left = std::clamp<int64_t>((free + Count(up[o]) - Count(down[o])) / 2, 0, free);
      for (const SequenceRows& range : either) {  // `left` of them go down
        const int64_t n = std::min(left, range.count);
        left -= n;
        if (n > 0) down[o].push_back({range.range, range.first, n});
        if (n < range.count) up[o].push_back({range.range, range.first + n, range.count - n});
      }
    }
    return {MakeFlow(queries, {Share(), -1, -1}, down), MakeFlow(queries, {Share(), 1, 1}, up)};
  }

  void Add(SequenceAction action) {
    s_.actions[static_cast<size_t>(Real(rank_))].push_back(std::move(action));
  }
  // The heads of this place.
  Heads Share() const { return s_.Share(place_); }
  void Message(SequenceAction action) {
    if (Count(action.rows) > 0 && action.head_begin < action.head_end) Add(std::move(action));
  }
  void OfRows(SequenceOp op, const Part& part, SequencePayload payload, int peer, int owner,
              const Rows& rows) {
    const bool merge = op == SequenceOp::kMerge;
    Message({.op = op,
             .payload = payload,
             .peer = merge ? -1 : Real(peer),
             .owner = owner,
             .rows = rows,
             .head_begin = part.heads.begin,
             .head_end = part.heads.end,
             .way = merge ? 0
                    : payload == SequencePayload::kQuery || payload == SequencePayload::kKeyValue
                        ? part.step
                        : part.back});
  }
  void Send(const Part& part, SequencePayload payload, int to, int owner, const Rows& rows) {
    OfRows(SequenceOp::kSend, part, payload, to, owner, rows);
  }
  void Receive(const Part& part, SequencePayload payload, int from, int owner, const Rows& rows) {
    OfRows(SequenceOp::kReceive, part, payload, from, owner, rows);
  }
  void ReceiveAndMerge(const Part& part, SequencePayload payload, int from, int owner,
                       const Rows& rows) {
    Receive(part, payload, from, owner, rows);
    OfRows(SequenceOp::kMerge, part, payload, from, owner, rows);
  }
  // A tile's heads have as many kv heads each: those at the ends of `heads` that lack others of
  // their kv head are tiles of their own.
  void AddTile(const Heads& heads, int q_owner, int k_owner, const Tile& t) {
    const int of_kv = s_.heads / s_.kv_heads;
    const int first = std::min((heads.begin + of_kv - 1) / of_kv * of_kv, heads.end),
              last = std::max(heads.end / of_kv * of_kv, first);
    for (const auto& [begin, end] :
         {std::pair(heads.begin, first), std::pair(first, last), std::pair(last, heads.end)})
      if (begin < end)
        Add({.op = SequenceOp::kTile,
             .owner = q_owner,
             .rows = {t.q},
             .key_owner = k_owner,
             .keys = t.k,
             .head_begin = begin,
             .head_end = end});
  }
  // Of this rank with `rows` of the owner.
  void Tiles(const Heads& heads, bool queries, int owner, const Rows& rows) {
    const int a = queries ? owner : rank_, b = queries ? rank_ : owner;
    for (const Tile& t : TilesOf(a, b))
      for (const SequenceRows& r : Intersection({queries ? t.q : t.k}, rows))
        if (const auto cut = Cut(a, queries ? r : t.q, b, queries ? t.k : r))
          AddTile(heads, a, b, *cut);
  }
  // This rank's own tiles, or the first or second half of their queries: one before anything
  // arrives and one while the last results are on their way.
  void Self(Half half) {
    for (const Tile& t : TilesOf(rank_, rank_)) {
      const int64_t middle = ranks_ > 1 ? t.q.count / 2 : 0;
      SequenceRows q = t.q;
      if (half == kFirstHalf) q.count = middle;
      if (half == kSecondHalf) q.first += middle, q.count -= middle;
      if (const auto cut = Cut(rank_, q, rank_, t.k)) AddTile(Share(), rank_, rank_, *cut);
    }
  }

  SequenceSchedule& s_;
  const int ranks_, per_group_;
  int rank_ = 0, place_ = 0;  // whose list is being made
  bool both_ways_ = false, mirrored_ = false;
  std::vector<std::vector<Tile>> tiles_;
};

}  // namespace

SequenceSchedule MakeSequenceSchedule(const SequenceMethod& method, SequencePass pass,
                                      const SequenceLayout& layout, const SequenceMask& mask,
                                      int heads, int kv_heads) {
  SHOAL_CHECK(kv_heads > 0 && heads % kv_heads == 0, "sequence",
              "{} heads are not a multiple of {} kv heads", heads, kv_heads);
  const bool hybrid = method.kind == SequenceKind::kHybrid;
  SHOAL_CHECK(!hybrid || static_cast<int>(method.rows) < kSequenceRowKinds, "sequence",
              "{} moves no rows between groups", Name(method.rows));
  SHOAL_CHECK(!method.both_ways || CanGoBothWays(hybrid ? method.rows : method.kind), "sequence",
              "{} does not go both ways by heads", Name(hybrid ? method.rows : method.kind));
  const int per_group =
      method.kind == SequenceKind::kUlysses ? layout.ranks() : (hybrid ? method.group : 1);
  SequenceSchedule schedule{method, pass,  layout,   layout.Groups(per_group),
                            mask,   heads, kv_heads, {}};
  Maker maker(schedule);
  maker.ExchangeHeads(SequencePayload::kHeads);
  schedule.method.both_ways = maker.MoveRows(schedule.rows_kind(), method.both_ways);
  maker.ExchangeHeads(SequencePayload::kHeadsResult);
  return schedule;
}

}  // namespace shoal
