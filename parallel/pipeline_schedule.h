// Pipeline schedules as data: for every rank the passes and messages of one optimizer step, in
// their order. A schedule is made here or read from a file; the same lists are printed, checked,
// simulated (parallel/pipeline_simulator.h) and executed. Nothing here runs ranks.
//
// p, v and m are ranks, stages per rank ("chunks") and micro-batches. The model is cut into p v
// stages. tF, tB and tW are the times of a stage's forward pass and of the two halves of its
// backward pass: the gradient of its input (B in papers on zero bubbles, I here) and those of its
// weights (W). A whole backward pass takes tB + tW. The bubble is the time of a step beyond that of
// its passes; as a ratio it is over their time, m v (tF + tB + tW), and not over the whole step.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace shoal {

enum class PipelineOp {
  kForward,
  kBackward,  // both halves
  kBackwardInput,
  kBackwardWeight,
  kSendActivation,
  kReceiveActivation,
  kSendGradient,
  kReceiveGradient,
};
constexpr int kPipelineOps = 8;
inline bool IsSend(PipelineOp op) {
  return op == PipelineOp::kSendActivation || op == PipelineOp::kSendGradient;
}
inline bool IsReceive(PipelineOp op) {
  return op == PipelineOp::kReceiveActivation || op == PipelineOp::kReceiveGradient;
}
inline bool IsMessage(PipelineOp op) { return IsSend(op) || IsReceive(op); }

// A message is named by the stage on its own side: an activation is the output of the stage that
// sends it and the input of the one that receives it; a gradient is that of the sender's input and
// of the receiver's output.
struct PipelineAction {
  PipelineOp op;
  int micro_batch;
  int chunk;  // which of the rank's stages
  bool operator==(const PipelineAction&) const = default;
};

struct PipelineSchedule {
  enum class Placement {
    kLoop,  // stage chunk * ranks + rank
    kV,     // two chunks: stages rank and 2 * ranks - 1 - rank
  };
  std::string name;  // its kind, or the file it is from
  int ranks = 1, chunks = 1, micro_batches = 1;
  Placement placement = Placement::kLoop;
  std::vector<std::vector<PipelineAction>> actions;  // by rank

  int stages() const { return ranks * chunks; }
  int Stage(int rank, int chunk) const;
  std::pair<int, int> Holder(int stage) const;  // rank, chunk

  // The rank at the other end of a send or receive of `rank`; -1 where there is no message: at the
  // ends of the model, and between two stages of one rank.
  int Peer(int rank, const PipelineAction& message) const;
  // The same number on both sides of a message, no other's; in [0, 2 stages() micro_batches).
  int64_t Message(int rank, const PipelineAction& message) const;
};

// A schedule of a kind, with its messages. All kinds take any p >= 1 and m >= 1. With equal stages
// and links that take no time:
//   gpipe        all forward passes, then all backward passes. Bubble (p-1)(tF+tB+tW), that is
//                (p-1)/m; m micro-batches in flight. (Huang et al., arXiv 1811.06965)
//   1f1b         rank i begins with p-i forward passes, then backward and forward passes take
//                turns. The same bubble; min(p-i, m) in flight. (Narayanan et al., arXiv
//                2006.09503)
//   interleaved  1f1b with v stages on each rank. (Narayanan et al., arXiv 2104.04473) A rank does
//                a group of micro-batches on one stage before it goes to the next. There are as
//                many groups as p fits into m whole, at least one; they are equal, but the first
//                ones may have one micro-batch more; so they have p if p divides m. Bubble
//                (p-1)(tF+tB+tW), that is (p-1)/(v m), for all m >= p; for fewer
//                (p-1 + (v-1)(p-m))(tF+tB+tW). If g is the largest group, rank i has at most
//                min(m v, (v-1) g + 2(p-1-i) + 1) stages' activations in flight. v = 1 is 1f1b.
//   zb_h1        1f1b with split backward passes: rank i does the weight half of micro-batch j-i
//                after the input half of j. Bubble (p-1) max(tF+tB-tW, tF, tB) for m >= p; for
//                fewer (p-1)(tF+tB) - (m-1) tW, if tW is not more than tF or tB. At most min(p, m)
//                in flight, on every rank. (Qi et al., arXiv 2401.10241)
//   zb_v         split backward passes, two stages on each rank in V placement: ZB-V of the same
//                paper. Forward passes and input halves have a fixed order; a weight half is done
//                when the rank would idle or hold more than 2p stages' activations (1f1b's memory),
//                by a clock on which tF = tB = tW = 1. At these times the bubble is (p-1) tF for
//                all m >= p, the least there is: so long does the last rank wait for its first
//                input. Once m >= 2p-1, a rank that has begun works without a gap. At other times
//                it was never found longer than zb_h1 while tW <= tF + tB; beyond that it may be.
// A kind that cannot have `chunks` stages per rank is an Error.
PipelineSchedule MakePipelineSchedule(std::string_view kind, int ranks, int chunks,
                                      int micro_batches);

// Adds the messages to a schedule that has none: sends right after the pass that makes what is
// sent, receives right before the one that needs it.
void InsertMessages(PipelineSchedule& schedule);

// Calls `visit(rank, i)` for every actions[rank][i]: a rank's in their order, and receives after
// their message has been sent. Returns how many actions each rank came to do: not all if ranks wait
// for each other. Every message of the schedule must have a Peer.
std::vector<size_t> WalkPipeline(const PipelineSchedule& schedule,
                                 const std::function<void(int, size_t)>& visit);

// "F3" is the forward pass of micro-batch 3, "F3.1" that of the rank's second stage; F, B, I and W
// are passes, SA, RA, SG and RG send and receive activations and gradients. ".0" may be left out,
// and is if there is one chunk.
std::string ActionText(const PipelineAction& action, int chunks);

// A schedule as text: a line for each rank, actions separated by commas, "#" before a comment, and
// before the ranks "placement = v" if they are not in a loop.
std::string WritePipelineSchedule(const PipelineSchedule& schedule, bool messages);
// Reads such a text; `source` names it in errors. If it has no sends and receives, they are
// inserted; otherwise it must have all of them. What CheckPipelineSchedule asks for is not checked.
PipelineSchedule ParsePipelineSchedule(std::string_view text, const std::string& source, int ranks,
                                       int chunks, int micro_batches);

// What a rank holds during a step: counts of one stage's share of one micro-batch, by rank.
struct PipelineFacts {
  // Activations, held from the forward pass until both halves of the backward pass are done.
  std::vector<int> peak_activations;
  // Gradients of outputs, kept between the two halves of a backward pass.
  std::vector<int> peak_gradients;
  // [rank][chunk * micro_batches + micro_batch]: index of the action that is the last to use these
  // activations.
  std::vector<std::vector<int>> last_use;
};

// Throws an Error that names rank and action unless every stage does every micro-batch's passes
// once and in order, every message is sent once and received once, before the pass that needs it,
// and the ranks come to an end. Sends never wait, receives do. Messages of one kind from one rank
// to another must be received in the order in which they are sent. In errors, a rank's actions are
// counted from 1, inserted messages too.
PipelineFacts CheckPipelineSchedule(const PipelineSchedule& schedule);

}  // namespace shoal
