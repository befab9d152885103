#include "parallel/pipeline.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "core/context.h"

namespace shoal {
namespace {

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

PipelineSimulation MeasuredPipeline(const PipelineSchedule& schedule,
                                    std::vector<std::vector<PipelineSimulation::Span>> spans) {
  PipelineSimulation measured;
  measured.schedule = schedule;
  double begin = std::numeric_limits<double>::infinity(), end = -begin;
  for (const auto& rank : spans) {
    for (const auto& span : rank) {
      begin = std::min(begin, span.start);
      end = std::max(end, span.end);
    }
  }
  measured.makespan = end - begin;
  for (size_t r = 0; r < spans.size(); ++r) {
    measured.busy.push_back(0);
    for (size_t i = 0; i < spans[r].size(); ++i) {
      auto& span = spans[r][i];
      span = {span.start - begin, span.end - begin};
      if (!IsMessage(schedule.actions[r][i].op)) measured.busy[r] += span.end - span.start;
    }
  }
  measured.bubble = measured.makespan / *std::ranges::max_element(measured.busy) - 1;
  measured.spans = std::move(spans);
  return measured;
}

// Least largest cost by dynamic programming over (stages, segments): sizes are small.
std::vector<int> CutIntoStages(std::span<const double> costs, int stages) {
  const auto n = static_cast<int>(costs.size());
  if (stages > n)
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
               "{} stages for a model of {} segments (the embedding, {} blocks, the head): set "
               "mesh.pp x pipeline.virtual_stages to {} at most",
               stages, n, n - 2, n);
  std::vector<double> sums = {0};
  for (const double cost : costs) sums.push_back(sums.back() + cost);
  const auto cost = [&](int begin, int end) {
    return sums[static_cast<size_t>(end)] - sums[static_cast<size_t>(begin)];
  };
  // best[s][i]: the first i segments on s stages.
  const auto width = static_cast<size_t>(n) + 1;
  std::vector<std::vector<double>> best(
      static_cast<size_t>(stages) + 1,
      std::vector<double>(width, std::numeric_limits<double>::infinity()));
  std::vector<std::vector<int>> from(static_cast<size_t>(stages) + 1, std::vector<int>(width));
  best[0][0] = 0;
  for (int s = 1; s <= stages; ++s) {
    for (int i = s; i <= n; ++i) {
      for (int j = s - 1; j < i; ++j) {
        const double largest =
            std::max(best[static_cast<size_t>(s) - 1][static_cast<size_t>(j)], cost(j, i));
        double& known = best[static_cast<size_t>(s)][static_cast<size_t>(i)];
        if (largest < known) {
          known = largest;
          from[static_cast<size_t>(s)][static_cast<size_t>(i)] = j;
        }
      }
    }
  }
  std::vector<int> bounds(static_cast<size_t>(stages) + 1);
  bounds.back() = n;
  for (int s = stages; s > 0; --s)
    bounds[static_cast<size_t>(s) - 1] =
        from[static_cast<size_t>(s)][static_cast<size_t>(bounds[static_cast<size_t>(s)])];
  return bounds;
}

PipelineExecutor::PipelineExecutor(PipelineSchedule schedule, Communicator& stages)
    : schedule_(std::move(schedule)), rank_(stages.rank()) {
  SHOAL_CHECK(stages.size() == schedule_.ranks, "pipeline", "a schedule of {} ranks on {}",
              schedule_.ranks, stages.size());
  CheckPipelineSchedule(schedule_);
  CheckConcurrent(stages, "pipeline", "pipeline stages send while they compute", "mesh.pp");
  activations_ = stages.Duplicate();
  gradients_ = stages.Duplicate();
  last_.resize(static_cast<size_t>(schedule_.chunks));
  for (const PipelineAction& a : schedule_.actions[static_cast<size_t>(rank_)]) {
    if (a.op == PipelineOp::kBackward || a.op == PipelineOp::kBackwardWeight)
      last_[static_cast<size_t>(a.chunk)] = a.micro_batch;
    if (!IsSend(a.op)) continue;
    // Messages to one rank must not wait for those to another.
    auto& links = a.op == PipelineOp::kSendActivation ? activation_links_ : gradient_links_;
    const int peer = schedule_.Peer(rank_, a);
    if (std::none_of(links.begin(), links.end(), [&](const Link& l) { return l.peer == peer; }))
      links.push_back({peer, std::make_unique<CommQueue>(stages)});
  }
  passes_.resize(static_cast<size_t>(schedule_.chunks) *
                 static_cast<size_t>(schedule_.micro_batches));
}

PipelineExecutor::Pass& PipelineExecutor::At(int chunk, int micro_batch) {
  return passes_[static_cast<size_t>(chunk) * static_cast<size_t>(schedule_.micro_batches) +
                 static_cast<size_t>(micro_batch)];
}

PipelineExecutor::Pass* PipelineExecutor::Neighbour(const PipelineAction& action, int distance) {
  const int stage = schedule_.Stage(rank_, action.chunk) + distance;
  if (stage < 0 || stage >= schedule_.stages()) return nullptr;
  const auto [rank, chunk] = schedule_.Holder(stage);
  return rank == rank_ ? &At(chunk, action.micro_batch) : nullptr;
}

double PipelineExecutor::Run(const PipelineWork& work) {
  for (Pass& pass : passes_) pass = {};
  loss_ = 0;
  try {
    RunActions(work);
  } catch (...) {
    // Whom the messages are for may wait for one that will not come.
    for (const auto* links : {&activation_links_, &gradient_links_})
      for (const Link& link : *links) link.queue->Abandon();
    throw;
  }
  return loss_;
}

void PipelineExecutor::RunActions(const PipelineWork& work) {
  spans_.clear();
  double now = Seconds();
  for (const PipelineAction& action : schedule_.actions[static_cast<size_t>(rank_)]) {
    Do(action, work);
    const double end = Seconds();
    spans_.push_back({now, end});
    now = end;
  }
  for (const auto* links : {&activation_links_, &gradient_links_})
    for (const Link& link : *links) link.queue->WaitAll();
}

void PipelineExecutor::Do(const PipelineAction& action, const PipelineWork& work) {
  Pass& pass = At(action.chunk, action.micro_batch);
  switch (action.op) {
    case PipelineOp::kForward:
      DoForward(action, work);
      break;
    case PipelineOp::kBackward:
    case PipelineOp::kBackwardInput:
      DoBackward(action);
      break;
    case PipelineOp::kBackwardWeight:
      pass.deferred.Run();
      break;
    case PipelineOp::kSendActivation:
      Send(action, pass.out);
      break;
    case PipelineOp::kSendGradient:
      // Nothing behind it may want a gradient.
      Send(action,
           pass.leaf->grad.defined()
               ? std::exchange(pass.leaf->grad, {})
               : Tensor::Full(work.boundary(action.micro_batch).shape(), pass.leaf->grad_dtype, 0));
      break;
    case PipelineOp::kReceiveActivation:
      pass.in = work.boundary(action.micro_batch);
      Receive(action, pass.in);
      break;
    case PipelineOp::kReceiveGradient:
      pass.gradient = work.boundary(action.micro_batch);
      Receive(action, pass.gradient);
      break;
  }
  if (action.op == PipelineOp::kBackward || action.op == PipelineOp::kBackwardWeight)
    work.shared(action.chunk, action.micro_batch == last_[static_cast<size_t>(action.chunk)]);
}

void PipelineExecutor::DoForward(const PipelineAction& action, const PipelineWork& work) {
  Pass& pass = At(action.chunk, action.micro_batch);
  if (const Pass* before = Neighbour(action, -1)) pass.in = before->out.Detached();
  if (pass.in.defined()) {
    pass.leaf = std::make_shared<Leaf>(pass.in.shape(), pass.in.dtype());
    pass.leaf->weight = false;
    // A message that waits to be fetched is no activation: how long it lives is the other's affair.
    pass.leaf->memory_class = MemoryClass::kCommunication;
    pass.in.set_node(pass.leaf);
  }
  // What the next stage does not keep of the input is free once this one has it.
  pass.out = work.forward(action.chunk, action.micro_batch, std::exchange(pass.in, {}));
  if (schedule_.Stage(rank_, action.chunk) + 1 == schedule_.stages()) loss_ += pass.out.Item();
}

void PipelineExecutor::DoBackward(const PipelineAction& action) {
  Pass& pass = At(action.chunk, action.micro_batch);
  if (const Pass* after = Neighbour(action, 1))
    pass.gradient = std::exchange(after->leaf->grad, {});
  BackwardOptions options;
  options.final_micro_batch = action.micro_batch == last_[static_cast<size_t>(action.chunk)];
  if (action.op == PipelineOp::kBackwardInput) options.deferred = &pass.deferred;
  const Tensor root = std::exchange(pass.out, {});
  Backward(root, std::exchange(pass.gradient, {}), options);
}

void PipelineExecutor::Receive(const PipelineAction& action, const Tensor& into) {
  const KernelTimer timer(profile_, "Communication");
  const bool forward = action.op == PipelineOp::kReceiveActivation;
  (forward ? activations_ : gradients_)->Receive(into.view(), schedule_.Peer(rank_, action));
}

void PipelineExecutor::Send(const PipelineAction& action, const Tensor& tensor) {
  const bool forward = action.op == PipelineOp::kSendActivation;
  const std::shared_ptr<Communicator>& group = forward ? activations_ : gradients_;
  const int peer = schedule_.Peer(rank_, action);
  const Tensor sent = tensor.contiguous() ? tensor.Detached() : tensor.Clone();
  for (const Link& link : forward ? activation_links_ : gradient_links_) {
    if (link.peer == peer)
      link.queue->Post([group = group, peer, sent] { group->Send(sent.view(), peer); });
  }
}

double PipelineExecutor::Forward(const PipelineWork& work) {
  const NoGrad no_grad;
  Tensor x;
  double loss = 0;
  for (int stage = 0; stage < schedule_.stages(); ++stage) {
    const auto [rank, chunk] = schedule_.Holder(stage);
    if (rank != rank_) continue;
    const PipelineAction receive = {PipelineOp::kReceiveActivation, 0, chunk};
    const PipelineAction send = {PipelineOp::kSendActivation, 0, chunk};
    if (schedule_.Peer(rank_, receive) >= 0) {
      x = work.boundary(0);
      Receive(receive, x);
    }
    x = work.forward(chunk, 0, x);
    if (schedule_.Peer(rank_, send) >= 0)
      activations_->Send((x.contiguous() ? x : x.Clone()).view(), schedule_.Peer(rank_, send));
    if (stage + 1 == schedule_.stages()) loss = x.Item();
  }
  return loss;
}

std::vector<std::pair<int, int>> PipelineExecutor::Segments(std::span<const int> bounds) const {
  std::vector<std::pair<int, int>> segments;
  for (int chunk = 0; chunk < schedule_.chunks; ++chunk) {
    const auto stage = static_cast<size_t>(schedule_.Stage(rank_, chunk));
    segments.emplace_back(bounds[stage], bounds[stage + 1]);
  }
  return segments;
}

int64_t PipelineExecutor::wire_bytes() const {
  return activations_->wire_bytes(Traffic::kData) + gradients_->wire_bytes(Traffic::kData);
}

}  // namespace shoal
