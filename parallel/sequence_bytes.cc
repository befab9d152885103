// Names and bytes of sequence-parallel schedules; see parallel/sequence_schedule.h.
#include <array>

#include "core/base/error.h"
#include "parallel/communicator.h"
#include "parallel/sequence_schedule.h"

namespace shoal {
namespace {

constexpr std::array kKinds = {"token_ring", "token_ring_relay", "token_ring_lagged",
                               "kv_ring",    "kv_ring_one_way",  "kv_direct",
                               "all_gather", "ulysses",          "hybrid"};
constexpr std::array kTags = {"Q", "O", "lse", "K", "V", "dO", "delta", "dQ", "dK", "dV"};
constexpr std::array kPayloads = {"query", "result", "kv", "kv_gradient", "heads", "heads_result"};
static_assert(kKinds.size() == kSequenceKinds && kTags.size() == kSequenceTags);

int64_t RowCount(const SequenceAction& message) {
  int64_t rows = 0;
  for (const SequenceRows& r : message.rows) rows += r.count;
  return rows;
}

}  // namespace

const char* Name(SequenceKind kind) { return kKinds[static_cast<size_t>(kind)]; }
const char* Name(SequenceTag tag) { return kTags[static_cast<size_t>(tag)]; }
const char* Name(SequencePayload payload) { return kPayloads[static_cast<size_t>(payload)]; }
const char* Name(SequencePass pass) {
  return pass == SequencePass::kForward ? "forward" : "backward";
}

SequenceKind ParseSequenceKind(std::string_view name) {
  std::string all;
  for (size_t i = 0; i < kKinds.size(); ++i) {
    if (name == kKinds[i]) return static_cast<SequenceKind>(i);
    all += fmt::format("{}{}", i ? ", " : "", kKinds[i]);
  }
  SHOAL_FAIL(ErrorKind::kConfig, "sequence", "sequence.schedule \"{}\" is none of auto, {}", name,
             all);
}

bool CanGoBothWays(SequenceKind rows) {
  return rows == SequenceKind::kTokenRing || rows == SequenceKind::kTokenRingRelay ||
         rows == SequenceKind::kTokenRingLagged;
}

std::string Describe(const SequenceMethod& method, int ranks) {
  const char* const how = method.both_ways ? " both ways" : "";
  if (method.kind != SequenceKind::kHybrid) return fmt::format("{}{}", Name(method.kind), how);
  return fmt::format("hybrid ({} x {}, {}{})", method.group, ranks / method.group,
                     Name(method.rows), how);
}

SequenceSchedule::Heads SequenceSchedule::Share(int rank) const {
  const int n = per_group(), place = rank % n, of_kv = heads / kv_heads;
  if (kv_heads >= n)
    return {static_cast<int>(ShardBegin(kv_heads, place, n)) * of_kv,
            static_cast<int>(ShardBegin(kv_heads, place + 1, n)) * of_kv};
  int kv = 0;  // whose ranks this is one of
  while (ShardBegin(n, kv + 1, kv_heads) <= place) ++kv;
  const auto first = static_cast<int>(ShardBegin(n, kv, kv_heads));
  const int sharers = static_cast<int>(ShardBegin(n, kv + 1, kv_heads)) - first;
  const auto bound = [&](int i) {
    return kv * of_kv + static_cast<int>(ShardBegin(of_kv, i, sharers));
  };
  return {bound(place - first), bound(place - first + 1)};
}

bool SequenceSchedule::SharesKvHeads() const {
  for (int place = 1; place < per_group(); ++place) {
    const Heads share = Share(place);
    if (!share.empty() && share.begin % (heads / kv_heads) != 0) return true;
  }
  return false;
}

std::vector<SequenceTag> TagsOf(SequencePayload payload, SequencePass pass) {
  using enum SequenceTag;
  const bool forward = pass == SequencePass::kForward;
  switch (payload) {
    case SequencePayload::kQuery:
      return forward ? std::vector{kQ} : std::vector{kLse, kDelta, kQ, kDO};
    case SequencePayload::kResult:
      return forward ? std::vector{kLse, kO} : std::vector{kDQ};
    case SequencePayload::kKeyValue:
      return {kK, kV};
    case SequencePayload::kKeyValueGradient:
      return {kDK, kDV};
    case SequencePayload::kHeads:
      return forward ? std::vector{kQ, kK, kV} : std::vector{kDO};
    case SequencePayload::kHeadsResult:
      return forward ? std::vector{kO} : std::vector{kDK, kDV, kDQ};
  }
  return {};
}

int64_t WidthOf(const SequenceSchedule& schedule, SequencePayload payload, SequenceTag tag,
                const SequenceWidths& widths) {
  const bool whole = payload == SequencePayload::kHeadsResult;  // over all keys or queries
  switch (tag) {
    case SequenceTag::kQ:
    case SequenceTag::kK:
    case SequenceTag::kV:
    case SequenceTag::kDO:
      return widths.element;
    case SequenceTag::kO:
      if (whole) return widths.element;
      return schedule.rows_kind() == SequenceKind::kTokenRingLagged ? widths.sum : widths.partial;
    case SequenceTag::kDQ:
      return whole ? widths.element : widths.sum;
    case SequenceTag::kDK:
    case SequenceTag::kDV:
      return whole && !schedule.SharesKvHeads() ? widths.element : widths.sum;
    case SequenceTag::kLse:
    case SequenceTag::kDelta:
      return widths.sum;
  }
  return 0;
}

int64_t RowElements(const SequenceSchedule& schedule, const SequenceAction& message,
                    SequenceTag tag, int64_t head_dim) {
  if (message.head_begin == message.head_end) return 0;
  switch (tag) {
    case SequenceTag::kLse:
    case SequenceTag::kDelta:
      return message.head_end - message.head_begin;
    case SequenceTag::kK:
    case SequenceTag::kV:
    case SequenceTag::kDK:
    case SequenceTag::kDV:
      return (schedule.KvEnd(message.head_end) - schedule.KvBegin(message.head_begin)) * head_dim;
    default:
      return (message.head_end - message.head_begin) * head_dim;
  }
}

int64_t MessageBytes(const SequenceSchedule& schedule, const SequenceAction& message,
                     SequenceTag tag, const SequenceWidths& widths) {
  return widths.batch * RowCount(message) * RowElements(schedule, message, tag, widths.head_dim) *
         WidthOf(schedule, message.payload, tag, widths);
}

int64_t MessageBytes(const SequenceSchedule& schedule, const SequenceAction& message,
                     const SequenceWidths& widths) {
  int64_t bytes = 0;
  for (const SequenceTag tag : TagsOf(message.payload, schedule.pass))
    bytes += MessageBytes(schedule, message, tag, widths);
  return bytes;
}

SequenceTraffic CountTraffic(const SequenceSchedule& schedule, const SequenceWidths& widths) {
  const int ranks = schedule.ranks();
  SequenceTraffic traffic{ranks, {}};
  traffic.bytes.resize(static_cast<size_t>(ranks) * static_cast<size_t>(ranks));
  for (int r = 0; r < ranks; ++r)
    for (const SequenceAction& a : schedule.actions[static_cast<size_t>(r)]) {
      if (a.op != SequenceOp::kSend) continue;
      for (const SequenceTag tag : TagsOf(a.payload, schedule.pass))
        traffic.bytes[static_cast<size_t>(r) * static_cast<size_t>(ranks) +
                      static_cast<size_t>(a.peer)][static_cast<size_t>(tag)] +=
            MessageBytes(schedule, a, tag, widths);
    }
  return traffic;
}

std::array<int64_t, 2> CountDirections(const SequenceSchedule& schedule,
                                       const SequenceWidths& widths) {
  std::array<int64_t, 2> bytes = {};
  for (const auto& list : schedule.actions)
    for (const SequenceAction& a : list)
      if (a.op == SequenceOp::kSend && a.way != 0)
        bytes[a.way > 0] += MessageBytes(schedule, a, widths);
  return bytes;
}

int64_t SequenceTraffic::Sent(int rank, SequenceTag tag) const {
  int64_t sum = 0;
  for (int to = 0; to < ranks; ++to)
    sum += bytes[static_cast<size_t>(rank) * static_cast<size_t>(ranks) + static_cast<size_t>(to)]
                [static_cast<size_t>(tag)];
  return sum;
}
int64_t SequenceTraffic::Sent(int rank) const {
  int64_t sum = 0;
  for (int t = 0; t < kSequenceTags; ++t) sum += Sent(rank, static_cast<SequenceTag>(t));
  return sum;
}
int64_t SequenceTraffic::Total(SequenceTag tag) const {
  int64_t sum = 0;
  for (int r = 0; r < ranks; ++r) sum += Sent(r, tag);
  return sum;
}
int64_t SequenceTraffic::Total() const {
  int64_t sum = 0;
  for (int r = 0; r < ranks; ++r) sum += Sent(r);
  return sum;
}

std::string ActionText(const SequenceAction& a) {
  const auto rows = [](const std::vector<SequenceRows>& all) {
    std::string text;
    for (const SequenceRows& r : all)
      text += fmt::format(" {}:[{}, {})", r.range, r.first, r.first + r.count);
    return text;
  };
  const std::string heads = fmt::format(" heads [{}, {})", a.head_begin, a.head_end);
  switch (a.op) {
    case SequenceOp::kSend:
      return fmt::format("send {} of {} to {}{}{}", Name(a.payload), a.owner, a.peer, rows(a.rows),
                         heads);
    case SequenceOp::kReceive:
      return fmt::format("receive {} of {} from {}{}{}", Name(a.payload), a.owner, a.peer,
                         rows(a.rows), heads);
    case SequenceOp::kMerge:
      return fmt::format("merge {} of {}{}{}", Name(a.payload), a.owner, rows(a.rows), heads);
    case SequenceOp::kTile:
      return fmt::format("tile {}{} x {}{}{}", a.owner, rows(a.rows), a.key_owner, rows({a.keys}),
                         heads);
  }
  return "";
}

std::string WriteSequenceSchedule(const SequenceSchedule& schedule) {
  std::string text =
      fmt::format("# {} {}, {} layout, {} tokens\n", Describe(schedule.method, schedule.ranks()),
                  Name(schedule.pass), Name(schedule.layout.kind()), schedule.layout.tokens());
  for (size_t r = 0; r < schedule.actions.size(); ++r) {
    text += fmt::format("{}:", r);
    for (const SequenceAction& a : schedule.actions[r])
      text += fmt::format("{}{}", &a == schedule.actions[r].data() ? " " : ", ", ActionText(a));
    text += '\n';
  }
  return text;
}

}  // namespace shoal
