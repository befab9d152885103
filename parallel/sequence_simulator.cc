#include "parallel/sequence_simulator.h"

#include <algorithm>
#include <deque>
#include <limits>
#include <queue>

#include "core/base/error.h"
#include "parallel/communicator.h"

namespace shoal {
namespace {

double Products(SequencePass pass) { return pass == SequencePass::kForward ? 2 : 5; }

// Documents may leave a tile less to do.
double TileSeconds(const SequenceSchedule& s, const SequenceAction& a, const SequenceWidths& widths,
                   const SequenceMachine& machine) {
  const int64_t pairs =
      VisiblePairs(s.Range(a.owner, a.rows[0]), s.Range(a.key_owner, a.keys), s.mask);
  return 2 * Products(s.pass) * static_cast<double>(pairs) *
         static_cast<double>(widths.batch * (a.head_end - a.head_begin) * widths.head_dim) /
         machine.flops;
}

class Simulator {
 public:
  Simulator(const SequenceSchedule& schedule, const SequenceWidths& widths,
            const SequenceMachine& machine)
      : s_(schedule), widths_(widths), machine_(machine), ranks_(schedule.ranks()) {
    const auto p = static_cast<size_t>(ranks_);
    clock_.resize(p);
    wait_.resize(p);
    compute_.resize(p);
    next_.resize(p);
    arrived_.resize(p * p);
    free_.resize(2 * p + p * p);
  }

  SequenceSimulation Run() {
    for (int r = 0; r < ranks_; ++r) Advance(r);
    while (!events_.empty()) {
      const Event e = events_.top();
      events_.pop();
      if (e.at == e.to) {
        arrived_[Pair(e.from, e.to)].push_back(e.time);
        Advance(e.to);
      } else {
        Hop(e);
      }
    }
    for (size_t r = 0; r < next_.size(); ++r)
      SHOAL_CHECK(next_[r] == s_.actions[r].size(), "sequence", "{}: rank {} waits for ever",
                  Name(s_.kind()), r);
    return {*std::ranges::max_element(clock_), *std::ranges::max_element(compute_),
            *std::ranges::max_element(wait_), waits_};
  }

 private:
  static constexpr int kSwitch = -1;
  struct Event {
    double time;
    int64_t number;    // in the order in which they were made, where times are equal
    int from, to, at;  // at: the rank where the message is, or kSwitch
    double bytes;
    bool operator>(const Event& o) const {
      return time != o.time ? time > o.time : number > o.number;
    }
  };

  size_t Pair(int from, int to) const {
    return static_cast<size_t>(from) * static_cast<size_t>(ranks_) + static_cast<size_t>(to);
  }

  // Does what rank r can do.
  void Advance(int rank) {
    const auto r = static_cast<size_t>(rank);
    for (; next_[r] < s_.actions[r].size(); ++next_[r]) {
      const SequenceAction& a = s_.actions[r][next_[r]];
      if (a.op == SequenceOp::kTile) {
        const double seconds = TileSeconds(s_, a, widths_, machine_);
        clock_[r] += seconds;
        compute_[r] += seconds;
      } else if (a.op == SequenceOp::kSend) {
        events_.push({clock_[r], number_++, rank, a.peer, rank,
                      static_cast<double>(MessageBytes(s_, a, widths_))});
      } else if (a.op == SequenceOp::kReceive) {
        auto& arrived = arrived_[Pair(a.peer, rank)];
        if (arrived.empty()) return;
        if (arrived.front() > clock_[r]) {
          wait_[r] += arrived.front() - clock_[r];
          clock_[r] = arrived.front();
          ++waits_;
        }
        arrived.pop_front();
      }
    }
  }

  void Hop(Event e) {
    const double time = machine_.latency + e.bytes / machine_.bandwidth;
    const auto pass = [&](size_t resource, double ready) {
      const double start = std::max(ready, free_[resource]);
      free_[resource] = start + time;
      return start;
    };
    const auto p = static_cast<size_t>(ranks_);
    switch (machine_.fabric) {
      case SequenceFabric::kMesh:
        e.time = pass(2 * p + Pair(e.from, e.to), e.time) + time;
        e.at = e.to;
        break;
      case SequenceFabric::kPort:
        // The way in is asked for when the way out begins.
        if (e.at == e.from) {
          e.time = pass(static_cast<size_t>(e.from), e.time);
          e.at = kSwitch;
        } else {
          e.time = pass(p + static_cast<size_t>(e.to), e.time) + time;
          e.at = e.to;
        }
        break;
      case SequenceFabric::kRing: {
        const int up = (e.to - e.at + ranks_) % ranks_;
        // Half way round, even and odd ranks go different ways.
        const bool upwards = 2 * up < ranks_ || (2 * up == ranks_ && e.at % 2 == 0);
        e.time = pass((upwards ? 0 : p) + static_cast<size_t>(e.at), e.time) + time;
        e.at = (e.at + (upwards ? 1 : ranks_ - 1)) % ranks_;
        break;
      }
    }
    e.number = number_++;
    events_.push(e);
  }

  const SequenceSchedule& s_;
  const SequenceWidths& widths_;
  const SequenceMachine& machine_;
  const int ranks_;
  std::vector<double> clock_, wait_, compute_;  // by rank
  std::vector<size_t> next_;                    // by rank: the next action
  std::vector<std::deque<double>> arrived_;     // by pair
  std::vector<double> free_;                    // by resource: from when on
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  int64_t number_ = 0;
  int waits_ = 0;
};

}  // namespace

const char* Name(SequenceFabric fabric) {
  constexpr const char* kNames[] = {"ring", "mesh", "port"};
  return kNames[static_cast<int>(fabric)];
}

SequenceSimulation SimulateSequence(const SequenceSchedule& schedule, const SequenceWidths& widths,
                                    const SequenceMachine& machine) {
  return Simulator(schedule, widths, machine).Run();
}

double SequenceTimeModel(const SequenceSchedule& schedule, const SequenceWidths& widths,
                         const SequenceMachine& machine) {
  const double p = schedule.groups.ranks(), u = schedule.per_group();
  if (schedule.ranks() < 2 || schedule.method.both_ways) return -1;
  // A rank's own part of all rows and heads, in elements of Q; while rows move it has as much, of
  // the group's rows and 1/U of the heads.
  const auto rows = static_cast<double>(schedule.layout.Rows(0));
  const double q = rows * static_cast<double>(widths.batch * schedule.heads * widths.head_dim);
  const double kv = 2 * q * schedule.kv_heads / schedule.heads;
  const double l = q / static_cast<double>(widths.head_dim);
  const double c = 2 * Products(schedule.pass) * rows * u * q / machine.flops;
  const bool forward = schedule.pass == SequencePass::kForward;
  const bool mesh = machine.fabric == SequenceFabric::kMesh;
  const bool one_by_one = machine.fabric == SequenceFabric::kPort;
  const bool at_once = mesh && p <= 4;
  const auto message = [&](double bytes) { return machine.latency + bytes / machine.bandwidth; };
  const auto e = static_cast<double>(widths.element), f = static_cast<double>(widths.sum);
  const double m_q = message(forward ? q * e : 2 * q * e + 2 * l * f);
  const double m_o = message(forward ? q * static_cast<double>(widths.partial) + l * f : q * f);
  double exchange = 0;
  if (u > 1) {
    // dK and dV of kv heads that shares have in common are parts of sums.
    if ((!one_by_one && !(mesh && u <= 4)) || schedule.kv_heads % schedule.per_group() != 0)
      return -1;
    exchange = (one_by_one ? u - 1 : 1) *
               (message((forward ? q + kv : q) * e / u) + message((forward ? q : q + kv) * e / u));
  }
  const auto with_exchange = [&](double seconds) { return exchange + seconds; };
  switch (schedule.rows_kind()) {
    case SequenceKind::kKvRingOneWay:
      if (!forward) break;
      return with_exchange(c + (p - 1) * std::max(c, message(kv * e)));
    case SequenceKind::kKvRing:
      if (!forward || one_by_one || p <= 2) break;
      return with_exchange(c + (p - 1) * std::max(c, message(kv * e / 2)));
    case SequenceKind::kKvDirect:
      if (!forward || !at_once) break;
      return with_exchange(std::max(c, message(kv * e)) + (p - 1) * c);
    case SequenceKind::kTokenRing:
      if (!at_once) break;
      return with_exchange(std::max(c / 2, m_q) + (p - 1) * c + std::max(c / 2, m_o));
    case SequenceKind::kTokenRingRelay:
      if (!mesh) break;
      return with_exchange(std::max(c / 2, m_q) + c + (p - 2) * std::max(c, m_q) +
                           std::max(c / 2, m_o));
    case SequenceKind::kAllGather:
      if (!at_once && !one_by_one) break;
      return with_exchange(
          (one_by_one ? p - 1 : 1) * (message(kv * e) + (forward ? 0 : message(kv * f))) + p * c);
    case SequenceKind::kUlysses:
      return with_exchange(c);
    default:
      break;
  }
  return -1;
}

std::vector<int> SequenceGroupSizes(int ranks) {
  std::vector<int> sizes;
  for (int n = 1; n <= ranks; ++n)
    if (ranks % n == 0) sizes.push_back(n);
  return sizes;
}

namespace {

// Of some methods the one that takes least time, and a text of all.
class Choice {
 public:
  Choice(SequencePass pass, const SequenceLayout& layout, const SequenceMask& mask, int heads,
         int kv_heads, const SequenceWidths& widths, const SequenceMachine& machine)
      : pass_(pass),
        layout_(layout),
        mask_(mask),
        heads_(heads),
        kv_heads_(kv_heads),
        widths_(widths),
        machine_(machine) {}

  struct Best {
    SequenceMethod method;
    double seconds = std::numeric_limits<double>::infinity();
  };

  // Of hybrids, which are of one size, the text names the best.
  Best Among(std::span<const SequenceMethod> methods) {
    Best least{methods[0]};
    for (const SequenceMethod& method : methods) {
      const SequenceSchedule schedule =
          MakeSequenceSchedule(method, pass_, layout_, mask_, heads_, kv_heads_);
      if (schedule.method != method) {  // no heads go the other way
        alike_ = true;
        continue;
      }
      const Best tried{method, SimulateSequence(schedule, widths_, machine_).seconds};
      if (tried.seconds < least.seconds) least = tried;
      if (method.kind != SequenceKind::kHybrid) Tell(tried);
    }
    if (least.method.kind == SequenceKind::kHybrid) Tell(least);
    return least;
  }
  const std::string& text() const { return text_; }
  bool alike() const { return alike_; }  // both ways would be one way

 private:
  void Tell(const Best& tried) {
    text_ += fmt::format("{}{} {:.3g}", text_.empty() ? "" : ", ",
                         Describe(tried.method, layout_.ranks()), tried.seconds * 1e3);
  }

  const SequencePass pass_;
  const SequenceLayout& layout_;
  const SequenceMask& mask_;
  const int heads_, kv_heads_;
  const SequenceWidths& widths_;
  const SequenceMachine& machine_;
  std::string text_;
  bool alike_ = false;
};

// Alone or, in groups, as a hybrid's; in one direction, both, or either.
std::vector<SequenceMethod> WaysOf(SequenceKind rows, int group, std::optional<bool> both_ways) {
  SequenceMethod method{rows};
  if (group > 1) method = {SequenceKind::kHybrid, group, rows};
  std::vector<SequenceMethod> ways;
  const bool can = CanGoBothWays(rows);
  if (!can || !both_ways.value_or(false)) ways.push_back(method);
  method.both_ways = true;
  if (can && both_ways.value_or(true)) ways.push_back(method);
  return ways;
}

}  // namespace

SequenceChoice ChooseSequence(const SequenceLayout& layout, const SequenceMask& mask, int heads,
                              int kv_heads, const SequenceWidths& widths,
                              const SequenceMachine& machine, std::span<const int> groups) {
  Choice forward(SequencePass::kForward, layout, mask, heads, kv_heads, widths, machine);
  Choice backward(SequencePass::kBackward, layout, mask, heads, kv_heads, widths, machine);
  using Passes = std::array<Choice::Best, 2>;
  const auto sum = [](const Passes& passes) { return passes[0].seconds + passes[1].seconds; };
  Passes least;
  for (const int group : groups) {
    std::vector<SequenceMethod> methods;
    for (int k = 0; k < kSequenceRowKinds && (group == 1 || group < layout.ranks()); ++k)
      for (const SequenceMethod& method : WaysOf(static_cast<SequenceKind>(k), group, {}))
        methods.push_back(method);
    if (methods.empty()) methods.push_back({SequenceKind::kUlysses});
    const Passes passes = {forward.Among(methods), backward.Among(methods)};
    if (sum(passes) < sum(least)) least = passes;
  }
  return {least[0].method, least[1].method,
          fmt::format("least milliseconds on a {} fabric: forward {}; backward {}",
                      Name(machine.fabric), forward.text(), backward.text()),
          least[0].seconds, least[1].seconds};
}

SequenceChoice ChooseWays(SequenceKind forward, SequenceKind backward,
                          std::optional<bool> both_ways, const SequenceLayout& layout,
                          const SequenceMask& mask, int heads, int kv_heads,
                          const SequenceWidths& widths, const SequenceMachine& machine) {
  std::array<Choice::Best, 2> best;
  std::string reason = "as asked for";
  for (const auto& [pass, kind] :
       {std::pair{SequencePass::kForward, forward}, {SequencePass::kBackward, backward}}) {
    Choice choice(pass, layout, mask, heads, kv_heads, widths, machine);
    best[static_cast<size_t>(pass)] = choice.Among(WaysOf(kind, 1, both_ways));
    if (!CanGoBothWays(kind) || both_ways) continue;
    reason +=
        fmt::format("; {} on a {} fabric: {} ms{}", Name(pass), Name(machine.fabric), choice.text(),
                    choice.alike() ? " (no cut between heads balances it)" : "");
  }
  return {best[0].method, best[1].method, reason, best[0].seconds, best[1].seconds};
}

}  // namespace shoal
