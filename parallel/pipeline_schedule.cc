#include "parallel/pipeline_schedule.h"

#include <fmt/core.h>

#include <algorithm>
#include <limits>

#include "core/base/error.h"

namespace shoal {
namespace {

using Order = std::vector<PipelineAction>;

// All passes of a rank, in the order in which every rank does its forward and backward passes.
struct Passes {
  Order forwards, backwards;
  int group;  // the largest number of micro-batches that one stage does before the next one
};

Passes AllPasses(int ranks, int chunks, int micro_batches) {
  Passes passes;
  const int groups = std::max(1, micro_batches / ranks);
  const int larger = micro_batches % groups;
  passes.group = micro_batches / groups + (larger > 0 ? 1 : 0);
  for (int k = 0, begin = 0; k < groups; ++k) {
    const int end = begin + micro_batches / groups + (k < larger ? 1 : 0);
    for (int chunk = 0; chunk < chunks; ++chunk)
      for (int j = begin; j < end; ++j) {
        passes.forwards.push_back({PipelineOp::kForward, j, chunk});
        passes.backwards.push_back({PipelineOp::kBackward, j, chunks - 1 - chunk});
      }
    begin = end;
  }
  return passes;
}

// `warm_up` forward passes, then backward and forward passes by turns.
Order Alternate(const Passes& passes, int64_t warm_up) {
  Order order;
  auto forward = passes.forwards.begin();
  const auto next_forward = [&] {
    if (forward != passes.forwards.end()) order.push_back(*forward++);
  };
  for (int64_t i = 0; i < warm_up; ++i) next_forward();
  for (const PipelineAction& backward : passes.backwards) {
    order.push_back(backward);
    next_forward();
  }
  return order;
}

// Halves the backward passes of a rank's one stage; weight halves come `lag` micro-batches late.
Order Split(const Order& order, int lag) {
  Order split, weights;
  for (PipelineAction action : order) {
    if (action.op == PipelineOp::kBackward) {
      weights.push_back({PipelineOp::kBackwardWeight, action.micro_batch, action.chunk});
      action.op = PipelineOp::kBackwardInput;
    }
    split.push_back(action);
    const int late = action.micro_batch - lag;
    if (action.op == PipelineOp::kBackwardInput && late >= 0)
      split.push_back(weights[static_cast<size_t>(late)]);
  }
  const auto rest = std::min<std::ptrdiff_t>(lag, std::ssize(weights));
  split.insert(split.end(), weights.end() - rest, weights.end());
  return split;
}

// ZB-V without its weight halves. The last rank turns micro-batches round as they come; a rank i
// before it has run 2(p-1-i) further ahead when the first one comes back. From then on its two
// stages take turns, and so do forward and backward passes.
Order TwoWayPasses(int rank, int ranks, int micro_batches) {
  Order order;
  int done[2][2] = {};
  const auto add = [&](PipelineOp op, int chunk) {
    int& next = done[op == PipelineOp::kForward ? 0 : 1][chunk];
    if (next < micro_batches) order.push_back({op, next++, chunk});
  };
  for (int i = 0; i < 2 * (ranks - rank) - 1; ++i) add(PipelineOp::kForward, 0);
  for (int i = 0; i < rank; ++i) {
    add(PipelineOp::kForward, 1);
    add(PipelineOp::kForward, 0);
  }
  for (int i = 0; i < ranks - rank; ++i) {
    add(PipelineOp::kForward, 1);
    add(PipelineOp::kBackwardInput, 1);
  }
  while (done[1][0] < micro_batches) {
    add(PipelineOp::kForward, 0);
    add(PipelineOp::kBackwardInput, 0);
    add(PipelineOp::kForward, 1);
    add(PipelineOp::kBackwardInput, 1);
  }
  return order;
}

// Adds the weight halves to orders of forward passes and input halves, by a clock on which every
// pass takes one tick: a rank does its next pass if it can, otherwise the weight half that has
// waited longest. No rank holds more than `most` activations.
void FillInWeightHalves(PipelineSchedule& schedule, int most) {
  constexpr int kNever = std::numeric_limits<int>::max();
  const int stages = schedule.stages();
  // The tick after which a stage's pass is done.
  const auto per_pass = static_cast<size_t>(stages) * static_cast<size_t>(schedule.micro_batches);
  std::vector<int> forward_done(per_pass, kNever), input_done(per_pass, kNever);
  const auto at = [&](std::vector<int>& done, int stage, int micro_batch) -> int& {
    return done[static_cast<size_t>(stage) * static_cast<size_t>(schedule.micro_batches) +
                static_cast<size_t>(micro_batch)];
  };
  struct RankState {
    Order order;
    size_t next = 0, weights = 0;  // passes of `order` and weight halves that are done
    int held = 0;
    Order waiting;  // weight halves, from the first; `weights` of them are done
  };
  std::vector<RankState> states(static_cast<size_t>(schedule.ranks));
  for (size_t r = 0; r < states.size(); ++r) std::swap(states[r].order, schedule.actions[r]);

  bool any = true;
  for (int now = 0; any; ++now) {
    any = false;
    for (int rank = 0; rank < schedule.ranks; ++rank) {
      RankState& state = states[static_cast<size_t>(rank)];
      Order& out = schedule.actions[static_cast<size_t>(rank)];
      if (state.next < state.order.size()) {
        const PipelineAction& action = state.order[state.next];
        const int stage = schedule.Stage(rank, action.chunk), j = action.micro_batch;
        const bool forward = action.op == PipelineOp::kForward;
        const bool ready =
            forward ? (stage == 0 || at(forward_done, stage - 1, j) <= now) && state.held < most
                    : stage == stages - 1 || at(input_done, stage + 1, j) <= now;
        if (ready) {
          at(forward ? forward_done : input_done, stage, j) = now + 1;
          if (forward)
            ++state.held;
          else
            state.waiting.push_back({PipelineOp::kBackwardWeight, j, action.chunk});
          out.push_back(action);
          ++state.next;
          any = true;
          continue;
        }
      }
      if (state.weights < state.waiting.size()) {
        out.push_back(state.waiting[state.weights++]);
        --state.held;
        any = true;
      }
    }
  }
  for (const RankState& state : states)
    SHOAL_CHECK(state.next == state.order.size(), "pipeline", "{} comes to no end", schedule.name);
}

void CheckSizes(std::string_view kind, int ranks, int chunks, int micro_batches) {
  if (ranks < 1)
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline", "mesh.pp is {}, but must be at least 1", ranks);
  if (chunks < 1)
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
               "pipeline.virtual_stages is {}, but must be at least 1", chunks);
  if (micro_batches < 1)
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
               "{} micro-batches in a step, but there must be at least 1: lower batch.micro",
               micro_batches);
  if ((kind == "gpipe" || kind == "1f1b" || kind == "zb_h1") && chunks != 1)
    SHOAL_FAIL(
        ErrorKind::kConfig, "pipeline",
        "pipeline.schedule \"{}\" has one stage per rank, but pipeline.virtual_stages is {}: "
        "set that to 1, or pipeline.schedule to \"interleaved\"",
        kind, chunks);
  if (kind == "zb_v" && chunks != 2)
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
               "pipeline.schedule \"zb_v\" has two stages per rank, but pipeline.virtual_stages is "
               "{}: set that to 2",
               chunks);
}

}  // namespace

int PipelineSchedule::Stage(int rank, int chunk) const {
  return placement == Placement::kV && chunk == 1 ? 2 * ranks - 1 - rank : chunk * ranks + rank;
}

std::pair<int, int> PipelineSchedule::Holder(int stage) const {
  const int chunk = stage / ranks;
  return {placement == Placement::kV && chunk == 1 ? 2 * ranks - 1 - stage : stage % ranks, chunk};
}

int PipelineSchedule::Peer(int rank, const PipelineAction& message) const {
  const bool next =
      message.op == PipelineOp::kSendActivation || message.op == PipelineOp::kReceiveGradient;
  const int other = Stage(rank, message.chunk) + (next ? 1 : -1);
  if (other < 0 || other >= stages()) return -1;
  const int peer = Holder(other).first;
  return peer == rank ? -1 : peer;
}

int64_t PipelineSchedule::Message(int rank, const PipelineAction& message) const {
  const bool gradient =
      message.op == PipelineOp::kSendGradient || message.op == PipelineOp::kReceiveGradient;
  const bool before =
      message.op == PipelineOp::kReceiveActivation || message.op == PipelineOp::kSendGradient;
  // The stage before the border that the message crosses.
  const int stage = Stage(rank, message.chunk) - (before ? 1 : 0);
  return ((gradient ? int64_t{stages()} : 0) + stage) * micro_batches + message.micro_batch;
}

PipelineSchedule MakePipelineSchedule(std::string_view kind, int ranks, int chunks,
                                      int micro_batches) {
  CheckSizes(kind, ranks, chunks, micro_batches);
  PipelineSchedule schedule{.name = std::string(kind),
                            .ranks = ranks,
                            .chunks = chunks,
                            .micro_batches = micro_batches,
                            .actions = std::vector<Order>(static_cast<size_t>(ranks))};
  const Passes passes = AllPasses(ranks, chunks, micro_batches);
  for (int rank = 0; rank < ranks; ++rank) {
    Order& order = schedule.actions[static_cast<size_t>(rank)];
    if (kind == "gpipe") {
      order = Alternate(passes, micro_batches);
    } else if (kind == "1f1b" || (kind == "interleaved" && chunks == 1)) {
      order = Alternate(passes, ranks - rank);
    } else if (kind == "interleaved") {
      // The first micro-batch to come back has been through all stages of the last rank; a rank
      // before it does two more for each step that it lies away.
      order = Alternate(passes, int64_t{chunks - 1} * passes.group + 2 * (ranks - 1 - rank) + 1);
    } else if (kind == "zb_h1") {
      order = Split(Alternate(passes, ranks - rank), rank);
    } else if (kind == "zb_v") {
      order = TwoWayPasses(rank, ranks, micro_batches);
    } else {
      SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
                 "no pipeline.schedule '{}'; there are gpipe, 1f1b, interleaved, zb_h1 and zb_v",
                 kind);
    }
  }
  if (kind == "zb_v") {
    schedule.placement = PipelineSchedule::Placement::kV;
    FillInWeightHalves(schedule, 2 * ranks);
  }
  InsertMessages(schedule);
  return schedule;
}

void InsertMessages(PipelineSchedule& schedule) {
  for (int rank = 0; rank < schedule.ranks; ++rank) {
    Order& order = schedule.actions[static_cast<size_t>(rank)];
    Order out;
    const auto add = [&](PipelineOp op, const PipelineAction& pass) {
      const PipelineAction message{op, pass.micro_batch, pass.chunk};
      if (schedule.Peer(rank, message) >= 0) out.push_back(message);
    };
    for (const PipelineAction& pass : order) {
      const bool forward = pass.op == PipelineOp::kForward;
      const bool crosses = pass.op != PipelineOp::kBackwardWeight;
      if (crosses)
        add(forward ? PipelineOp::kReceiveActivation : PipelineOp::kReceiveGradient, pass);
      out.push_back(pass);
      if (crosses) add(forward ? PipelineOp::kSendActivation : PipelineOp::kSendGradient, pass);
    }
    order = std::move(out);
  }
}

std::vector<size_t> WalkPipeline(const PipelineSchedule& schedule,
                                 const std::function<void(int, size_t)>& visit) {
  const auto ranks = static_cast<size_t>(schedule.ranks);
  std::vector<bool> sent(2 * static_cast<size_t>(schedule.stages()) *
                         static_cast<size_t>(schedule.micro_batches));
  std::vector<size_t> next(ranks, 0);
  std::vector<int64_t> waits_for(ranks, -1);
  std::vector<int> ready;  // ranks that can go on
  for (int rank = schedule.ranks - 1; rank >= 0; --rank) ready.push_back(rank);
  while (!ready.empty()) {
    const int rank = ready.back();
    ready.pop_back();
    const auto r = static_cast<size_t>(rank);
    for (waits_for[r] = -1; next[r] < schedule.actions[r].size(); ++next[r]) {
      const PipelineAction& action = schedule.actions[r][next[r]];
      const int64_t message = IsMessage(action.op) ? schedule.Message(rank, action) : -1;
      if (IsReceive(action.op) && !sent[static_cast<size_t>(message)]) {
        waits_for[r] = message;
        break;
      }
      visit(rank, next[r]);
      if (!IsSend(action.op)) continue;
      sent[static_cast<size_t>(message)] = true;
      const int peer = schedule.Peer(rank, action);
      if (waits_for[static_cast<size_t>(peer)] == message) ready.push_back(peer);
    }
  }
  return next;
}

}  // namespace shoal
