// What a schedule must fulfil; see parallel/pipeline_schedule.h.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <tuple>

#include "core/base/error.h"
#include "parallel/pipeline_schedule.h"

namespace shoal {
namespace {

constexpr int kAbsent = -1;

class Checker {
 public:
  explicit Checker(const PipelineSchedule& schedule) : s_(schedule) {}

  PipelineFacts Check() {
    CheckSizes();
    CheckActions();
    CheckWhole();
    CheckNeeds();
    CheckLinks();
    CheckEnd();
    return Facts();
  }

 private:
  using Placement = PipelineSchedule::Placement;

  void CheckSizes() const {
    if (s_.ranks < 1 || s_.chunks < 1 || s_.micro_batches < 1 ||
        std::ssize(s_.actions) != s_.ranks || (s_.placement == Placement::kV && s_.chunks != 2))
      SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
                 "{}: {} lists of actions do not make {} ranks (mesh.pp) of {} stages "
                 "(pipeline.virtual_stages) with {} micro-batches",
                 s_.name, s_.actions.size(), s_.ranks, s_.chunks, s_.micro_batches);
  }

  // Every action is one that can be, and is there once.
  void CheckActions() {
    const size_t slots = static_cast<size_t>(kPipelineOps) * static_cast<size_t>(s_.chunks) *
                         static_cast<size_t>(s_.micro_batches);
    places_.assign(s_.actions.size(), std::vector<int>(slots, kAbsent));
    for (int rank = 0; rank < s_.ranks; ++rank)
      for (int i = 0; i < Count(rank); ++i) {
        const PipelineAction& a = Action(rank, i);
        if (a.micro_batch < 0 || a.micro_batch >= s_.micro_batches)
          Fail(rank, i, "micro-batches are 0 to {}", s_.micro_batches - 1);
        if (a.chunk < 0 || a.chunk >= s_.chunks)
          Fail(rank, i, "a rank's stages are 0 to {}", s_.chunks - 1);
        if (IsMessage(a.op) && s_.Peer(rank, a) < 0)
          Fail(rank, i,
               "there is no such message: the stage at its other end is not there or on this rank");
        int before = Find(rank, a.op, a);
        if (a.op == PipelineOp::kBackward)
          before = std::max({before, Find(rank, PipelineOp::kBackwardInput, a),
                             Find(rank, PipelineOp::kBackwardWeight, a)});
        if (a.op == PipelineOp::kBackwardInput || a.op == PipelineOp::kBackwardWeight)
          before = std::max(before, Find(rank, PipelineOp::kBackward, a));
        if (before != kAbsent) Fail(rank, i, "already done by {}", Name(rank, before));
        places_[static_cast<size_t>(rank)][Slot(a.op, a)] = i;
      }
  }

  // Every stage does all passes of every micro-batch, and sends what the next one needs.
  void CheckWhole() const {
    for (int rank = 0; rank < s_.ranks; ++rank)
      for (int chunk = 0; chunk < s_.chunks; ++chunk)
        for (int j = 0; j < s_.micro_batches; ++j) {
          const auto has = [&](PipelineOp op) { return Find(rank, op, {op, j, chunk}) != kAbsent; };
          const auto require = [&](PipelineOp op) {
            if (!has(op))
              SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
                         "{}: rank {}: {} is missing; every stage does micro-batches 0 to {}",
                         s_.name, rank, Text({op, j, chunk}), s_.micro_batches - 1);
          };
          require(PipelineOp::kForward);
          if (has(PipelineOp::kBackwardInput) || has(PipelineOp::kBackwardWeight)) {
            require(PipelineOp::kBackwardInput);
            require(PipelineOp::kBackwardWeight);
          } else {
            require(PipelineOp::kBackward);
          }
          for (const PipelineOp op : {PipelineOp::kSendActivation, PipelineOp::kSendGradient}) {
            const int peer = s_.Peer(rank, {op, j, chunk});
            if (peer >= 0 && !has(op))
              SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
                         "{}: rank {}: {} is missing; rank {} cannot go on without it", s_.name,
                         rank, Text({op, j, chunk}), peer);
          }
        }
  }

  // What an action of a rank needs on this rank comes before it.
  void CheckNeeds() const {
    for (int rank = 0; rank < s_.ranks; ++rank)
      for (int i = 0; i < Count(rank); ++i) {
        const PipelineAction& a = Action(rank, i);
        switch (a.op) {
          case PipelineOp::kForward:
            NeedNeighbour(rank, i, PipelineOp::kReceiveActivation, PipelineOp::kForward);
            break;
          case PipelineOp::kBackward:
          case PipelineOp::kBackwardInput:
            Need(rank, i, {PipelineOp::kForward, a.micro_batch, a.chunk});
            NeedNeighbour(rank, i, PipelineOp::kReceiveGradient, PipelineOp::kBackward);
            break;
          case PipelineOp::kBackwardWeight:
            Need(rank, i, {PipelineOp::kBackwardInput, a.micro_batch, a.chunk});
            break;
          case PipelineOp::kSendActivation:
            Need(rank, i, {PipelineOp::kForward, a.micro_batch, a.chunk});
            break;
          case PipelineOp::kSendGradient:
            Need(rank, i, {PipelineOp::kBackward, a.micro_batch, a.chunk});
            break;
          case PipelineOp::kReceiveActivation:
          case PipelineOp::kReceiveGradient:
            break;  // that it was sent is known; when, is the other rank's
        }
      }
  }

  // The input of a pass: by `receive`, or by `pass` of the stage next to it on the same rank.
  void NeedNeighbour(int rank, int i, PipelineOp receive, PipelineOp pass) const {
    const PipelineAction& a = Action(rank, i);
    const int stage =
        s_.Stage(rank, a.chunk) + (receive == PipelineOp::kReceiveActivation ? -1 : 1);
    if (stage < 0 || stage >= s_.stages()) return;
    const auto [holder, chunk] = s_.Holder(stage);
    if (holder == rank)
      Need(rank, i, {pass, a.micro_batch, chunk});
    else
      Need(rank, i, {receive, a.micro_batch, a.chunk});
  }

  // kBackward stands for its input half as well.
  void Need(int rank, int i, PipelineAction needed) const {
    if (needed.op == PipelineOp::kBackward && Find(rank, needed.op, needed) == kAbsent)
      needed.op = PipelineOp::kBackwardInput;
    const int place = Find(rank, needed.op, needed);
    if (place == kAbsent) Fail(rank, i, "needs {}, which is missing", Text(needed));
    if (place > i)
      Fail(rank, i, "needs {}, which comes later: {}", Text(needed), Name(rank, place));
  }

  // Every message that is received was sent, and in this order. All that must be sent is sent, and
  // received because a pass needs it; so only the order can differ.
  void CheckLinks() const {
    struct Link {
      std::vector<int> sends;  // places on the sending rank
      size_t received = 0;
    };
    std::map<std::tuple<bool, int, int>, Link> links;  // gradients?, from, to
    for (int rank = 0; rank < s_.ranks; ++rank)
      for (int i = 0; i < Count(rank); ++i) {
        const PipelineAction& a = Action(rank, i);
        if (IsSend(a.op))
          links[{a.op == PipelineOp::kSendGradient, rank, s_.Peer(rank, a)}].sends.push_back(i);
      }
    for (int rank = 0; rank < s_.ranks; ++rank)
      for (int i = 0; i < Count(rank); ++i) {
        const PipelineAction& a = Action(rank, i);
        if (!IsReceive(a.op)) continue;
        const int from = s_.Peer(rank, a);
        Link& link = links[{a.op == PipelineOp::kReceiveGradient, from, rank}];
        const int sent = link.sends[link.received++];
        if (s_.Message(from, Action(from, sent)) != s_.Message(rank, a))
          Fail(rank, i,
               "messages arrive in the order in which they are sent, and the next one from rank {} "
               "is that of its {}",
               from, Name(from, sent));
      }
  }

  // No ranks wait for each other.
  void CheckEnd() const {
    const std::vector<size_t> done = WalkPipeline(s_, [](int, size_t) {});
    const auto at = [&](int rank) { return static_cast<int>(done[static_cast<size_t>(rank)]); };
    int rank = 0;
    while (rank < s_.ranks && at(rank) == Count(rank)) ++rank;
    if (rank == s_.ranks) return;
    // A rank that has stopped waits for one that has stopped, so that the chain closes.
    std::vector<bool> seen(s_.actions.size(), false);
    for (; !seen[static_cast<size_t>(rank)]; rank = s_.Peer(rank, Action(rank, at(rank))))
      seen[static_cast<size_t>(rank)] = true;
    std::string chain;
    const int first = rank;
    do {
      const PipelineAction& receive = Action(rank, at(rank));
      const int from = s_.Peer(rank, receive);
      chain += fmt::format("{}rank {} waits at {} for rank {}'s {}", chain.empty() ? "" : "; ",
                           rank, Name(rank, at(rank)), from, Name(from, SendOf(rank, receive)));
      rank = from;
    } while (rank != first);
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline", "{}: deadlock: {}", s_.name, chain);
  }

  int SendOf(int rank, const PipelineAction& receive) const {
    const bool activation = receive.op == PipelineOp::kReceiveActivation;
    const auto [from, chunk] = s_.Holder(s_.Stage(rank, receive.chunk) + (activation ? -1 : 1));
    const PipelineOp op = activation ? PipelineOp::kSendActivation : PipelineOp::kSendGradient;
    return Find(from, op, {op, receive.micro_batch, chunk});
  }

  PipelineFacts Facts() const {
    PipelineFacts facts;
    for (int rank = 0; rank < s_.ranks; ++rank) {
      int activations = 0, gradients = 0, most_activations = 0, most_gradients = 0;
      std::vector<int> last_use(static_cast<size_t>(s_.chunks) *
                                static_cast<size_t>(s_.micro_batches));
      for (int i = 0; i < Count(rank); ++i) {
        const PipelineAction& a = Action(rank, i);
        if (a.op == PipelineOp::kForward) ++activations;
        if (a.op == PipelineOp::kBackwardInput) ++gradients;
        most_activations = std::max(most_activations, activations);
        most_gradients = std::max(most_gradients, gradients);
        if (a.op == PipelineOp::kBackwardWeight) --gradients;
        if (a.op == PipelineOp::kBackward || a.op == PipelineOp::kBackwardWeight) {
          --activations;
          last_use[static_cast<size_t>(a.chunk) * static_cast<size_t>(s_.micro_batches) +
                   static_cast<size_t>(a.micro_batch)] = i;
        }
      }
      facts.peak_activations.push_back(most_activations);
      facts.peak_gradients.push_back(most_gradients);
      facts.last_use.push_back(std::move(last_use));
    }
    return facts;
  }

  int Count(int rank) const {
    return static_cast<int>(s_.actions[static_cast<size_t>(rank)].size());
  }
  const PipelineAction& Action(int rank, int i) const {
    return s_.actions[static_cast<size_t>(rank)][static_cast<size_t>(i)];
  }
  std::string Text(const PipelineAction& a) const { return ActionText(a, s_.chunks); }
  std::string Name(int rank, int i) const {
    return fmt::format("action {} ({})", i + 1, Text(Action(rank, i)));
  }

  size_t Slot(PipelineOp op, const PipelineAction& a) const {
    return (static_cast<size_t>(op) * static_cast<size_t>(s_.chunks) +
            static_cast<size_t>(a.chunk)) *
               static_cast<size_t>(s_.micro_batches) +
           static_cast<size_t>(a.micro_batch);
  }
  // Where a rank does `op` for a's micro-batch and chunk.
  int Find(int rank, PipelineOp op, const PipelineAction& a) const {
    return places_[static_cast<size_t>(rank)][Slot(op, a)];
  }

  template <typename... Args>
  [[noreturn]] void Fail(int rank, int i, fmt::format_string<Args...> format,
                         Args&&... args) const {
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline", "{}: rank {}, {}: {}", s_.name, rank, Name(rank, i),
               fmt::format(format, std::forward<Args>(args)...));
  }

  const PipelineSchedule& s_;
  std::vector<std::vector<int>> places_;  // by rank and slot: the index of the action, or kAbsent
};

}  // namespace

PipelineFacts CheckPipelineSchedule(const PipelineSchedule& schedule) {
  return Checker(schedule).Check();
}

}  // namespace shoal
