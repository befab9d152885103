// Sequence-parallel attention as data: for every rank the tiles and messages of one attention
// layer's forward or backward pass, in their order. The same lists are checked, counted in bytes,
// simulated (parallel/sequence_simulator.h) and executed (parallel/sequence_attention.h). Nothing
// here runs ranks.
//
// Each rank owns the rows of q, k, v and of the result that its layout says. A tile is attention of
// some queries of one owner to some keys of one owner, by whoever holds both; a query's results
// over different keys are merged (kernels/attention.h). Tiles that the mask leaves empty are not
// computed, and only rows that somebody's tile needs are sent. Sums that travel are at least f32.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/sequence_layout.h"

namespace shoal {

// Whose rows move. P ranks; q is the elements of a rank's Q, and kv / heads of that those of its K
// or V. Elements that a rank sends, forward | backward, of full attention:
//   token_ring        Q straight to those who hold keys, (O, lse) straight back; K and V stay.
//                     (P-1)(2q + lse) | (P-1)(2q + lse + delta, and q of dQ): dK and dV never
//                     leave. After TokenRing (arXiv 2412.20501), which has the forward pass only.
//   token_ring_relay  the same, but Q goes from neighbour to neighbour
//   token_ring_lagged both go from neighbour to neighbour, half of the rows each way; results are
//                     merged on the way, one step behind their queries
//   kv_ring           K and V go from neighbour to neighbour, half of the rows each way:
//                     (P-1) 2q kv/heads | the same, and (P-1) 2q kv/heads of dK and dV, summed on
//                     the way, from the first visitor to the last and from there home. (Ring
//                     Attention, arXiv 2310.01889, sends one way)
//   kv_ring_one_way   the same in one direction
//   kv_direct         K and V straight to those who need them, dK and dV straight back
//   all_gather        kv_direct, but nothing is computed before all keys are there, and they are
//                     all held: the simple way
//   ulysses           each rank gets all rows of its share of the heads (DeepSpeed-Ulysses, arXiv
//                     2309.14509): (P-1)/P (2 + 2 kv/heads) q | the same. A share is whole kv heads
//                     with their query heads; where there are fewer kv heads than ranks, some of
//                     the query heads of one, which then goes to each of its ranks.
//   hybrid            U ranks in a row are a group, within which each gets the group's rows of its
//                     share of the heads, as by ulysses; then the R = P/U ranks with the same share
//                     move rows by any schedule above. The bytes of that with R-1 for P-1, and
//                     (U-1)/U (2 + 2 kv/heads) q. (USP, arXiv 2405.07719; LoongTrain, arXiv
//                     2406.18485)
// A ring turns in the direction in which fewer rows travel: to lower ranks for a causal mask and a
// zigzag layout, which leaves 3/4 of the rows where 2P divides the tokens.
//
// By heads, a token ring goes both ways: queries of some heads go to lower ranks, those of the
// other, mirrored, ones to higher ranks, and results accordingly. Then both directions carry the
// same bytes even where a query, or {Q, dO, lse, delta}, is not as wide as what comes back for it.
// The cut is between kv heads, where the directions come nearest to each other; of n kv heads are
// mirrored
//   n/2    of full attention, and wherever rows go straight
//   3/4 n P/(P+1)  of a causal mask and a zigzag layout, from neighbour to neighbour: all other
//          ranks need the late half of a rank's queries, which may go round either way, but the
//          early half goes down, or would pass ranks that need none of it. So the bytes stay 3/4.
//          (The halves of rank P-1 are one range, which goes one way.)
//   none   of a causal mask and a contiguous layout, as only lower ranks need a query
enum class SequenceKind {
  kTokenRing,
  kTokenRingRelay,
  kTokenRingLagged,
  kKvRing,
  kKvRingOneWay,
  kKvDirect,
  kAllGather,
  kUlysses,
  kHybrid,
};
constexpr int kSequenceKinds = 9;
constexpr int kSequenceRowKinds = 7;  // the first ones, which move rows and all heads of them
const char* Name(SequenceKind kind);
SequenceKind ParseSequenceKind(std::string_view name);

// How a pass is done.
struct SequenceMethod {
  SequenceKind kind;
  int group = 1;                                 // of hybrid: the ranks that exchange heads
  SequenceKind rows = SequenceKind::kTokenRing;  // of hybrid: how rows move between groups
  bool both_ways = false;                        // by heads, of a token ring

  bool operator==(const SequenceMethod&) const = default;
};
bool CanGoBothWays(SequenceKind rows);

// "kv_ring", "token_ring both ways", "hybrid (2 x 4, kv_ring)" of 8 ranks.
std::string Describe(const SequenceMethod& method, int ranks);

enum class SequencePass { kForward, kBackward };
const char* Name(SequencePass pass);

enum class SequenceTag { kQ, kO, kLse, kK, kV, kDO, kDelta, kDQ, kDK, kDV };
constexpr int kSequenceTags = 10;
const char* Name(SequenceTag tag);

// What a message holds, forward | backward.
enum class SequencePayload {
  kQuery,             // Q | Q, dO, lse, delta
  kResult,            // O, lse | dQ
  kKeyValue,          // K, V
  kKeyValueGradient,  // - | dK, dV
  kHeads,             // Q, K, V | dO: of some heads, to who works on them
  kHeadsResult,       // O | dQ, dK, dV: back
};
const char* Name(SequencePayload payload);

enum class SequenceOp {
  kSend,     // waits only where too many are in flight
  kReceive,  // waits for the message
  kTile,
  kMerge,  // what was received last into what is held here of its owner's result or gradients
};

// Rows [first, first + count) of one of an owner's ranges. A message has one such run of each range
// at most, which may hold rows that nobody needs between those that somebody does.
struct SequenceRows {
  int range;
  int64_t first, count;
  bool operator==(const SequenceRows&) const = default;
};

struct SequenceAction {
  SequenceOp op;
  SequencePayload payload = {};  // of a message or a merge
  int peer = -1;                 // of a message: the rank at its other end
  // Of the rows, or of a tile's queries: a group, and a rank where heads are exchanged.
  int owner = -1;
  std::vector<SequenceRows> rows = {};  // of a tile: one
  int key_owner = -1;                   // of a tile
  SequenceRows keys = {};
  int head_begin = 0, head_end = 0;  // query heads; kv heads are those that they need
  int way = 0;  // of a message of rows: round the ring to lower ranks, -1, or to higher ones, +1

  bool ExchangesHeads() const {
    return (op == SequenceOp::kSend || op == SequenceOp::kReceive) &&
           (payload == SequencePayload::kHeads || payload == SequencePayload::kHeadsResult);
  }
  bool SameMessage(const SequenceAction& other) const {
    return payload == other.payload && owner == other.owner && rows == other.rows &&
           head_begin == other.head_begin && head_end == other.head_end;
  }
};

struct SequenceSchedule {
  SequenceMethod method;
  SequencePass pass;
  SequenceLayout layout;
  SequenceLayout groups;  // the rows of ranks that exchange heads together; of one: as layout
  SequenceMask mask;
  int heads, kv_heads;
  std::vector<std::vector<SequenceAction>> actions;  // by rank

  SequenceKind kind() const { return method.kind; }
  int ranks() const { return layout.ranks(); }
  // Ranks of a group; rank r is the r % per_group()-th of group r / per_group().
  int per_group() const { return layout.ranks() / groups.ranks(); }
  int GroupOf(int rank) const { return rank / per_group(); }
  // How rows move between groups.
  SequenceKind rows_kind() const { return kind() == SequenceKind::kHybrid ? method.rows : kind(); }
  // Of a group's rows.
  TokenRange Range(int group, const SequenceRows& rows) const {
    return groups.ranges(group)[static_cast<size_t>(rows.range)].Part(rows.first, rows.count);
  }
  struct Heads {
    int begin, end;
    bool empty() const { return begin >= end; }
    bool operator==(const Heads&) const = default;
  };
  // The query heads that a rank works on. They have as many kv heads each, or one.
  Heads Share(int rank) const;
  int KvBegin(int head) const { return head / (heads / kv_heads); }
  int KvEnd(int head_end) const { return (head_end + heads / kv_heads - 1) / (heads / kv_heads); }
  // How many messages of a rank may be on their way, so that one that is ahead of its receivers
  // does not hold ever more of them. Those of part of the heads are as many bytes.
  size_t SendsInFlight() const { return method.both_ways ? 12 : 6; }
  // Whether dK and dV of some kv head come from several shares of the heads.
  bool SharesKvHeads() const;
};

// The result's method goes both ways only if heads are mirrored: one head is not, if it has to be
// all of them or nothing.
SequenceSchedule MakeSequenceSchedule(const SequenceMethod& method, SequencePass pass,
                                      const SequenceLayout& layout, const SequenceMask& mask,
                                      int heads, int kv_heads);

// What turns rows into bytes.
struct SequenceWidths {
  int64_t batch = 1, head_dim = 64;
  int64_t element = 2;  // bytes of q, k, v, dO and of results of exchanged heads
  int64_t partial = 2;  // of O on its way to be merged by its owner
  int64_t sum = 4;      // of lse, delta, dQ, dK, dV, and of O that is merged on its way
};

// In the order in which they lie in a message: wide ones first, so that all are aligned.
std::vector<SequenceTag> TagsOf(SequencePayload payload, SequencePass pass);
// Bytes of one element of `tag` on the wire.
int64_t WidthOf(const SequenceSchedule& schedule, SequencePayload payload, SequenceTag tag,
                const SequenceWidths& widths);
// Elements of a message: of a row, and bytes in all.
int64_t RowElements(const SequenceSchedule& schedule, const SequenceAction& message,
                    SequenceTag tag, int64_t head_dim);
int64_t MessageBytes(const SequenceSchedule& schedule, const SequenceAction& message,
                     SequenceTag tag, const SequenceWidths& widths);
int64_t MessageBytes(const SequenceSchedule& schedule, const SequenceAction& message,
                     const SequenceWidths& widths);

// Bytes from each rank to each, by tag: [from * ranks + to][tag].
struct SequenceTraffic {
  int ranks;
  std::vector<std::array<int64_t, kSequenceTags>> bytes;
  int64_t Sent(int rank) const;  // all tags
  int64_t Sent(int rank, SequenceTag tag) const;
  int64_t Total(SequenceTag tag) const;
  int64_t Total() const;
};
SequenceTraffic CountTraffic(const SequenceSchedule& schedule, const SequenceWidths& widths);
// Bytes of the messages of rows that go to lower ranks, and to higher ones.
std::array<int64_t, 2> CountDirections(const SequenceSchedule& schedule,
                                       const SequenceWidths& widths);

// Calls visit(rank, i) for every actions[rank][i]: a rank's in their order, and a receive after its
// message was sent. `strict`: as if a rank's sends were done one after the other, each when its
// receiver comes to it, and the rank waited where it has that many in flight; what comes to an end
// so does so with any buffers. Returns how many actions each rank came to do: not all if ranks wait
// for each other.
std::vector<size_t> WalkSequence(const SequenceSchedule& schedule, bool strict,
                                 const std::function<void(int, size_t)>& visit);

// Throws an Error that names rank and action unless all messages are received in the order in which
// they are sent, the ranks come to an end (strictly), no tile uses rows that are not there, every
// visible pair of query and key is in one tile of every head, each tile's share comes into its
// owner's result and gradients once, tiles are of whole kv heads or of one, and heads are exchanged
// before and after all that, each rank's rows once with every rank of its group.
void CheckSequenceSchedule(const SequenceSchedule& schedule);

std::string ActionText(const SequenceAction& action);
// A line for each rank.
std::string WriteSequenceSchedule(const SequenceSchedule& schedule);

}  // namespace shoal
