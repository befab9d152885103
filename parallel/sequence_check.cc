// What a schedule must fulfil; see parallel/sequence_schedule.h.
#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <tuple>

#include "core/base/error.h"
#include "parallel/sequence_sets.h"

namespace shoal {
namespace {

// A tile's share in its queries' results, or in its keys' gradients: of these rows and this cut of
// the heads.
struct Share {
  int tile, cut;
  SequenceRows rows;
};

class Checker {
 public:
  explicit Checker(const SequenceSchedule& schedule) : s_(schedule) {}

  void Check() {
    CutHeads();
    const std::vector<size_t> done =
        WalkSequence(s_, true, [&](int rank, size_t i) { Visit(rank, i); });
    for (int rank = 0; rank < s_.ranks(); ++rank) {
      const auto r = static_cast<size_t>(rank);
      if (done[r] < s_.actions[r].size()) Fail(rank, done[r], "waits for ever");
    }
    for (const auto& [ranks, waiting] : sent_)
      if (!waiting.empty()) Fail(ranks.first, waiting.front(), "is not received");
    if (s_.per_group() > 1) CheckHeads();
    CheckCover();
    CheckShares();
  }

 private:
  using Key = std::tuple<int, bool, int, int>;  // rank, of keys, owner, cut of the heads

  // The heads of tiles and of messages of rows begin and end at cuts; what lies between two goes
  // the same ways, and is checked for itself. Known by its first head.
  void CutHeads() {
    cuts_.resize(static_cast<size_t>(s_.per_group()));
    for (int rank = 0; rank < s_.ranks(); ++rank) {
      const SequenceSchedule::Heads share = s_.Share(rank);
      std::set<int>& cuts = cuts_[static_cast<size_t>(rank % s_.per_group())];
      if (!share.empty()) cuts.insert({share.begin, share.end});
      for (const SequenceAction& a : s_.actions[static_cast<size_t>(rank)])
        if (!a.ExchangesHeads()) cuts.insert({a.head_begin, a.head_end});
    }
  }
  std::vector<int> CutsOf(int rank, int begin, int end) const {
    const std::set<int>& cuts = cuts_[static_cast<size_t>(rank % s_.per_group())];
    return {cuts.lower_bound(begin), cuts.lower_bound(end)};
  }
  std::vector<int> CutsOf(int rank, const SequenceAction& a) const {
    return CutsOf(rank, a.head_begin, a.head_end);
  }

  void Visit(int rank, size_t i) {
    const SequenceAction& a = s_.actions[static_cast<size_t>(rank)][i];
    CheckRows(rank, i, a.ExchangesHeads() ? s_.layout : s_.groups, a.owner, a.rows);
    if (a.op == SequenceOp::kTile) CheckRows(rank, i, s_.groups, a.key_owner, {a.keys});
    a.ExchangesHeads() ? CheckExchange(rank, i) : CheckHeadsOf(rank, i);
    switch (a.op) {
      case SequenceOp::kSend:
        sent_[{rank, a.peer}].push_back(i);
        if (Carries(a)) moving_[{rank, a.peer}].push_back(Take(rank, a));
        break;
      case SequenceOp::kReceive: {
        auto& queue = sent_[{a.peer, rank}];
        if (!s_.actions[static_cast<size_t>(a.peer)][queue.front()].SameMessage(a))
          Fail(rank, i, "rank {} sends something else: {}", a.peer,
               ActionText(s_.actions[static_cast<size_t>(a.peer)][queue.front()]));
        queue.pop_front();
        if (Carries(a)) {
          if (inbox_.contains(rank)) Fail(rank, i, "what was received before is not merged");
          auto& moving = moving_[{a.peer, rank}];
          inbox_[rank] = {i, moving.front()};
          moving.pop_front();
        } else {
          if (a.ExchangesHeads()) break;
          for (const int cut : CutsOf(rank, a)) {
            auto& held = held_[{rank, a.payload == SequencePayload::kKeyValue, a.owner, cut}];
            held.insert(held.end(), a.rows.begin(), a.rows.end());
          }
        }
        break;
      }
      case SequenceOp::kMerge: {
        if (!inbox_.contains(rank)) Fail(rank, i, "nothing was received, or it is merged already");
        const auto& [received, more] = inbox_[rank];
        if (!s_.actions[static_cast<size_t>(rank)][received].SameMessage(a))
          Fail(rank, i, "what was received last is something else");
        for (const Share& share : more)
          shares_[{rank, OfKeys(a), a.owner, share.cut}].push_back(share);
        inbox_.erase(rank);
        break;
      }
      case SequenceOp::kTile:
        tiles_.emplace_back(rank, i);
        const int tile = static_cast<int>(tiles_.size()) - 1;
        for (const int cut : CutsOf(rank, a)) {
          Need(rank, i, {rank, false, a.owner, cut}, a.rows[0]);
          Need(rank, i, {rank, true, a.key_owner, cut}, a.keys);
          shares_[{rank, false, a.owner, cut}].push_back({tile, cut, a.rows[0]});
          if (s_.pass == SequencePass::kBackward)
            shares_[{rank, true, a.key_owner, cut}].push_back({tile, cut, a.keys});
        }
        break;
    }
  }

  // Whether a message holds results or gradients.
  static bool Carries(const SequenceAction& a) {
    return a.payload == SequencePayload::kResult || a.payload == SequencePayload::kKeyValueGradient;
  }
  static bool OfKeys(const SequenceAction& a) {
    return a.payload == SequencePayload::kKeyValueGradient;
  }

  std::vector<Share> Take(int rank, const SequenceAction& a) {
    std::vector<Share> taken;
    for (const int cut : CutsOf(rank, a)) {
      std::vector<Share>& shares = shares_[{rank, OfKeys(a), a.owner, cut}];
      std::vector<Share> left;
      for (const Share& share : shares) {
        for (const SequenceRows& r : Intersection({share.rows}, a.rows))
          taken.push_back({share.tile, cut, r});
        for (const SequenceRows& r : Difference({share.rows}, a.rows))
          left.push_back({share.tile, cut, r});
      }
      shares = left;
    }
    return taken;
  }

  void Need(int rank, size_t i, const Key& key, const SequenceRows& rows) {
    const int owner = std::get<2>(key);
    if (owner == s_.GroupOf(rank)) return;
    if (std::ranges::none_of(held_[key], [&](const SequenceRows& h) { return Inside(rows, h); }))
      Fail(rank, i, "these rows of rank {} are not here", owner);
  }

  int64_t Pairs(const TokenRange& q, const TokenRange& k) const {
    if (s_.mask.documents.empty()) return VisiblePairs(q, k, s_.mask);
    const int64_t tokens = s_.layout.tokens();
    int64_t pairs = 0;
    for (size_t b = 0; b < s_.mask.documents.size(); b += static_cast<size_t>(tokens))
      for (int64_t i = 0; i < q.count; ++i)
        for (int64_t j = 0; j < k.count; ++j) {
          const int64_t x = q.Token(i), y = k.Token(j);
          pairs += (!s_.mask.causal || y <= x) && (s_.mask.window == 0 || y > x - s_.mask.window) &&
                   s_.mask.documents[b + static_cast<size_t>(x)] ==
                       s_.mask.documents[b + static_cast<size_t>(y)];
        }
    return pairs;
  }

  void CheckCover() const {
    // The share of the heads and the cut of it; owners and ranges of queries and keys.
    using Place = std::tuple<int, int, int, int, int, int>;
    std::map<Place, std::vector<const SequenceAction*>> cover;
    for (const auto& [rank, i] : tiles_) {
      const SequenceAction& a = s_.actions[static_cast<size_t>(rank)][i];
      for (const int cut : CutsOf(rank, a)) {
        auto& others = cover[{rank % s_.per_group(), cut, a.owner, a.rows[0].range, a.key_owner,
                              a.keys.range}];
        for (const SequenceAction* other : others)
          if (Overlap(other->rows[0], a.rows[0]) && Overlap(other->keys, a.keys))
            Fail(rank, i, "overlaps {}", ActionText(*other));
        others.push_back(&a);
      }
    }
    for (int a = 0; a < s_.groups.ranks(); ++a)
      for (int b = 0; b < s_.groups.ranks(); ++b)
        for (int i = 0; i < std::ssize(s_.groups.ranges(a)); ++i)
          for (int j = 0; j < std::ssize(s_.groups.ranges(b)); ++j) {
            const int64_t all = Pairs(s_.groups.ranges(a)[static_cast<size_t>(i)],
                                      s_.groups.ranges(b)[static_cast<size_t>(j)]);
            for (int share = 0; share < s_.per_group(); ++share)
              for (const int cut : CutsOf(share, s_.Share(share).begin, s_.Share(share).end)) {
                int64_t pairs = 0;
                const auto found = cover.find({share, cut, a, i, b, j});
                if (found != cover.end())
                  for (const SequenceAction* t : found->second)
                    pairs += Pairs(s_.Range(a, t->rows[0]), s_.Range(b, t->keys));
                if (pairs != all)
                  SHOAL_FAIL(ErrorKind::kConfig, "sequence",
                             "{}: tiles have {} of the {} visible pairs of {}'s queries and {}'s "
                             "keys, for heads from {} on",
                             Name(s_.kind()), pairs, all, a, b, cut);
              }
          }
  }

  void CheckShares() const {
    std::vector<std::array<int64_t, 2>> rows(tiles_.size());
    for (const auto& [key, shares] : shares_) {
      const auto& [rank, of_keys, owner, cut] = key;
      for (const Share& share : shares) {
        const auto& [at, i] = tiles_[static_cast<size_t>(share.tile)];
        if (s_.GroupOf(rank) != owner) Fail(at, i, "its share stays at rank {}", rank);
        rows[static_cast<size_t>(share.tile)][of_keys] += share.rows.count;
      }
    }
    for (size_t t = 0; t < tiles_.size(); ++t) {
      const auto& [rank, i] = tiles_[t];
      const SequenceAction& a = s_.actions[static_cast<size_t>(rank)][i];
      const int64_t cuts = std::ssize(CutsOf(rank, a));
      const int64_t keys = s_.pass == SequencePass::kBackward ? a.keys.count : 0;
      if (rows[t][0] != cuts * a.rows[0].count || rows[t][1] != cuts * keys)
        Fail(rank, i, "{} and {} of its rows' shares come to their owners", rows[t][0], rows[t][1]);
    }
  }

  void CheckRows(int rank, size_t i, const SequenceLayout& layout, int owner,
                 const std::vector<SequenceRows>& rows) const {
    const auto is = [&](const SequenceRows& r) {
      return r.range >= 0 && r.range < std::ssize(layout.ranges(owner)) && r.count > 0 &&
             Inside(r, {r.range, 0, layout.ranges(owner)[static_cast<size_t>(r.range)].count});
    };
    if (owner < 0 || owner >= layout.ranks() || rows.empty() || !std::ranges::all_of(rows, is))
      Fail(rank, i, "{} has no such rows", owner);
  }

  // Tiles and rows between groups are of this rank's heads; a tile's are of one kv head, or all
  // heads of some, and keys and their gradients move for all heads of theirs here.
  void CheckHeadsOf(int rank, size_t i) {
    const SequenceAction& a = s_.actions[static_cast<size_t>(rank)][i];
    const SequenceSchedule::Heads share = s_.Share(rank);
    if (a.head_begin < share.begin || a.head_end > share.end || a.head_begin >= a.head_end)
      Fail(rank, i, "heads [{}, {}) are not this rank's, which are [{}, {})", a.head_begin,
           a.head_end, share.begin, share.end);
    const bool tile = a.op == SequenceOp::kTile;
    const bool of_one = tile && s_.KvEnd(a.head_end) - s_.KvBegin(a.head_begin) == 1;
    const bool of_queries =
        a.payload == SequencePayload::kQuery || a.payload == SequencePayload::kResult;
    if (tile ? !of_one : !of_queries)
      for (const int head : {a.head_begin, a.head_end})
        if ((tile || (head != share.begin && head != share.end)) &&
            head % (s_.heads / s_.kv_heads) != 0)
          Fail(rank, i, "head {} is in the midst of those of a kv head", head);
    if (exchanged_[{rank, true}] > 0) Fail(rank, i, "comes after heads' results");
    if (exchanged_[{rank, false}] < Partners(rank, false))
      Fail(rank, i, "comes before all heads of the group's rows are here");
  }

  // All rows of their owner, of the heads of who works on them, within the group and once.
  void CheckExchange(int rank, size_t i) {
    const SequenceAction& a = s_.actions[static_cast<size_t>(rank)][i];
    const bool back = a.payload == SequencePayload::kHeadsResult;
    const bool send = a.op == SequenceOp::kSend;
    const int worker = send == back ? rank : a.peer, owner = send == back ? a.peer : rank;
    const SequenceSchedule::Heads share = s_.Share(worker);
    int64_t rows = 0;
    for (const SequenceRows& r : a.rows) rows += r.count;
    if (s_.GroupOf(a.peer) != s_.GroupOf(rank) || a.peer == rank)
      Fail(rank, i, "heads go between ranks of one group");
    if (a.owner != owner || a.head_begin != share.begin || a.head_end != share.end ||
        rows != s_.layout.Rows(owner))
      Fail(rank, i, "should be all rows of rank {}, of rank {}'s heads", owner, worker);
    if (!met_.insert({rank, a.peer, back, send}).second) Fail(rank, i, "comes twice");
    if (!back && exchanged_[{rank, true}] > 0) Fail(rank, i, "comes after heads' results");
    if (!send) ++exchanged_[{rank, back}];
  }
  // From how many ranks a rank receives heads, or their results.
  int Partners(int rank, bool back) const {
    const auto owns = [&](int r) { return s_.layout.Rows(r) > 0; };
    const auto works = [&](int r) { return !s_.Share(r).empty(); };
    const int first = s_.GroupOf(rank) * s_.per_group();
    int partners = 0;
    for (int r = first; r < first + s_.per_group(); ++r)
      partners += r != rank && (back ? owns(rank) && works(r) : works(rank) && owns(r));
    return partners;
  }

  void CheckHeads() {
    int heads = 0;
    for (int r = 0; r < s_.per_group(); ++r) {
      const SequenceSchedule::Heads share = s_.Share(r);
      if (share.begin != heads && !share.empty())
        SHOAL_FAIL(ErrorKind::kConfig, "sequence", "{}: heads from {} on are nobody's, or twice",
                   Name(s_.kind()), heads);
      heads = std::max(heads, share.end);
    }
    if (heads != s_.heads)
      SHOAL_FAIL(ErrorKind::kConfig, "sequence", "{}: {} of {} heads are worked on",
                 Name(s_.kind()), heads, s_.heads);
    for (int r = 0; r < s_.ranks(); ++r)
      for (const bool back : {false, true})
        if (exchanged_[{r, back}] != Partners(r, back))
          SHOAL_FAIL(ErrorKind::kConfig, "sequence",
                     "{} {}: rank {} receives heads{} from {} of {} ranks", Name(s_.kind()),
                     Name(s_.pass), r, back ? "' results" : "", exchanged_[{r, back}],
                     Partners(r, back));
  }

  template <typename... Args>
  [[noreturn]] void Fail(int rank, size_t i, fmt::format_string<Args...> format,
                         Args&&... args) const {
    SHOAL_FAIL(ErrorKind::kConfig, "sequence", "{} {}: rank {}, action {} ({}): {}",
               Name(s_.kind()), Name(s_.pass), rank, i + 1,
               ActionText(s_.actions[static_cast<size_t>(rank)][i]),
               fmt::format(format, std::forward<Args>(args)...));
  }

  const SequenceSchedule& s_;
  std::vector<std::set<int>> cuts_;                         // by share of the heads
  std::map<std::pair<int, int>, std::deque<size_t>> sent_;  // from, to: indices of sends
  std::map<std::pair<int, int>, std::deque<std::vector<Share>>> moving_;
  // By rank: the message that was received and is not merged, and what is in it.
  std::map<int, std::pair<size_t, std::vector<Share>>> inbox_;
  std::map<Key, std::vector<Share>> shares_;
  std::map<Key, std::vector<SequenceRows>> held_;
  std::vector<std::pair<int, size_t>> tiles_;       // rank, action
  std::map<std::pair<int, bool>, int> exchanged_;   // rank, whether back: messages received
  std::set<std::tuple<int, int, bool, bool>> met_;  // rank, peer, whether back, whether sent
};

}  // namespace

std::vector<size_t> WalkSequence(const SequenceSchedule& schedule, bool strict,
                                 const std::function<void(int, size_t)>& visit) {
  const auto ranks = static_cast<size_t>(schedule.ranks());
  std::vector<size_t> done(ranks);
  std::vector<std::deque<int>> sends(ranks);  // by rank: receivers of what it has sent
  std::vector<std::deque<int>> waiting(ranks * ranks);
  for (bool progress = true; progress;) {
    progress = false;
    for (size_t r = 0; r < ranks; ++r)
      while (done[r] < schedule.actions[r].size()) {
        const SequenceAction& a = schedule.actions[r][done[r]];
        const auto peer = static_cast<size_t>(std::max(a.peer, 0));
        if (a.op == SequenceOp::kSend) {
          if (strict) {
            if (sends[r].size() >= schedule.SendsInFlight()) break;
            sends[r].push_back(a.peer);
          } else
            waiting[r * ranks + peer].push_back(a.peer);
        } else if (a.op == SequenceOp::kReceive) {
          auto& queue = strict ? sends[peer] : waiting[peer * ranks + r];
          if (queue.empty() || queue.front() != static_cast<int>(r)) break;
          queue.pop_front();
        }
        visit(static_cast<int>(r), done[r]++);
        progress = true;
      }
  }
  return done;
}

void CheckSequenceSchedule(const SequenceSchedule& schedule) { Checker(schedule).Check(); }

}  // namespace shoal
