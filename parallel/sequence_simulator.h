// A sequence-parallel schedule on a virtual clock, the time model that it follows, and the choice
// of a schedule by it.
//
// A rank computes its tiles one after the other, waits where it receives, and never where it sends.
// A message takes latency + bytes / bandwidth on each resource that it passes; a resource serves
// one message after the other:
//   ring  2 P directed links between neighbours; further ranks are reached by the shorter way, a
//         message being passed on when all of it is there
//   mesh  P (P-1) directed links
//   port  each rank has one way out and one way in, between which a switch loses no time
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "parallel/sequence_schedule.h"

namespace shoal {

enum class SequenceFabric { kRing, kMesh, kPort };
const char* Name(SequenceFabric fabric);

struct SequenceMachine {
  SequenceFabric fabric = SequenceFabric::kPort;
  double flops = 1e11;      // per second and rank, of attention's products
  double bandwidth = 1e10;  // bytes per second of a resource
  double latency = 5e-6;    // seconds, of a resource
};

struct SequenceSimulation {
  double seconds = 0;
  double compute = 0;  // of the busiest rank
  double exposed = 0;  // the most that a rank waits
  int waits = 0;       // receives that came before their message, over all ranks
};
SequenceSimulation SimulateSequence(const SequenceSchedule& schedule, const SequenceWidths& widths,
                                    const SequenceMachine& machine);

// Seconds of full attention (no mask) where P divides the tokens, in closed form. C is the time of
// a tile of a rank's queries with a rank's keys, M_x that of a message of x:
//   kv_ring_one_way    forward: C + (P-1) max(C, M_kv), on every fabric
//   kv_ring            the same with half of the rows in a message; ring and mesh, P > 2
//   token_ring_relay   mesh: max(C/2, M_q) + C + (P-2) max(C, M_q) + max(C/2, M_o); backward with
//                      {Q, dO, lse, delta} for q and dQ for o
//   token_ring         mesh, P <= 4: max(C/2, M_q) + (P-1) C + max(C/2, M_o); backward alike
//   kv_direct          forward: mesh, P <= 4: max(C, M_kv) + (P-1) C
//   all_gather         M_kv + P C + M_dkv, the last backward only; mesh, P <= 4
//   ulysses            M_in + P C + M_out; mesh, P <= 4
//   hybrid             M_in + the form of its rows among R ranks, C of the group's rows and 1/U of
//                      the heads + M_out; U as P of ulysses
// On a port the exchanges of the last three have P-1 or U-1 messages one after the other, for any
// P. Negative where there is no form.
double SequenceTimeModel(const SequenceSchedule& schedule, const SequenceWidths& widths,
                         const SequenceMachine& machine);

struct SequenceChoice {
  SequenceMethod forward, backward;
  std::string reason;
  double forward_seconds = 0, backward_seconds = 0;
};
// What takes the least simulated time of groups of these sizes: 1 is all that moves rows, P
// ulysses, and others hybrid; token rings go one way or both. What a forward keeps for its backward
// are a group's rows, so both passes have groups of the same size. `groups` is not empty.
SequenceChoice ChooseSequence(const SequenceLayout& layout, const SequenceMask& mask, int heads,
                              int kv_heads, const SequenceWidths& widths,
                              const SequenceMachine& machine, std::span<const int> groups);
// Of these kinds, which are no hybrids: whether a token ring goes both ways, where that is not
// said.
SequenceChoice ChooseWays(SequenceKind forward, SequenceKind backward,
                          std::optional<bool> both_ways, const SequenceLayout& layout,
                          const SequenceMask& mask, int heads, int kv_heads,
                          const SequenceWidths& widths, const SequenceMachine& machine);
std::vector<int> SequenceGroupSizes(int ranks);  // all: the divisors, in ascending order

}  // namespace shoal
