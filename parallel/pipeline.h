// Pipeline parallelism: a model's segments cut into stages, and the executor that runs a schedule
// (parallel/pipeline_schedule.h) over the ranks that hold them. The executor knows no model: what a
// stage computes is given to it.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/autograd.h"
#include "parallel/comm_queue.h"
#include "parallel/communicator.h"
#include "parallel/pipeline_schedule.h"
#include "parallel/pipeline_simulator.h"

namespace shoal {

// Bounds of the stages: stage s has segments [bounds[s], bounds[s + 1]), at least one. The
// costliest stage is as cheap as it can be, and then the first stages have as few as they can.
// Error(kConfig) if there are more stages than segments.
std::vector<int> CutIntoStages(std::span<const double> costs, int stages);

// What a rank's stages compute.
struct PipelineWork {
  // The stage `chunk` of this rank on a micro-batch. `in` is undefined on the first stage; the
  // result is the loss, a scalar, on the last.
  std::function<Tensor(int chunk, int micro_batch, const Tensor& in)> forward;
  // Memory for an activation between two stages, with its placement.
  std::function<Tensor(int micro_batch)> boundary;
  // The gradients of the chunk's weights have their share of a micro-batch; `last`: and of all.
  std::function<void(int chunk, bool last)> shared;
};

// A step as it was: the spans of each of the schedule's ranks, on one clock.
PipelineSimulation MeasuredPipeline(const PipelineSchedule& schedule,
                                    std::vector<std::vector<PipelineSimulation::Span>> spans);

class PipelineExecutor {
 public:
  // Checks the schedule. Collective over the ranks of `stages`, one for each of the schedule's.
  PipelineExecutor(PipelineSchedule schedule, Communicator& stages);

  // One optimizer step's passes: the sum of the losses on the rank with the last stage, 0
  // elsewhere. Sends run behind computation. Backward passes add to the leaves' gradients.
  double Run(const PipelineWork& work);
  // One micro-batch forward, without gradients; the same result.
  double Forward(const PipelineWork& work);

  const PipelineSchedule& schedule() const { return schedule_; }
  // The segments of this rank: one range for each of its stages, in a cut into stages() of them.
  std::vector<std::pair<int, int>> Segments(std::span<const int> bounds) const;
  int64_t wire_bytes() const;
  // When this rank's actions of the last Run began and ended, in seconds of the host's steady
  // clock.
  const std::vector<PipelineSimulation::Span>& spans() const { return spans_; }
  // Time that receives wait goes to `profile` (may be null) from now on.
  void set_profile(KernelProfile* profile) { profile_ = profile; }

 private:
  // What is kept of a micro-batch on a stage between its passes.
  struct Pass {
    Tensor in, out;  // `in` is a leaf
    std::shared_ptr<Leaf> leaf;
    Tensor gradient;  // of `out`, received
    DeferredGradients deferred;
  };
  // One direction of one kind of message.
  struct Link {
    int peer;
    std::unique_ptr<CommQueue> queue;
  };

  Pass& At(int chunk, int micro_batch);
  // The pass of the stage before or after on this rank, or null.
  Pass* Neighbour(const PipelineAction& action, int distance);
  void RunActions(const PipelineWork& work);
  void Do(const PipelineAction& action, const PipelineWork& work);
  void DoForward(const PipelineAction& action, const PipelineWork& work);
  void DoBackward(const PipelineAction& action);
  void Receive(const PipelineAction& action, const Tensor& into);
  void Send(const PipelineAction& action, const Tensor& tensor);

  PipelineSchedule schedule_;
  int rank_;
  std::vector<int> last_;  // by chunk: the micro-batch whose weights' gradients come last
  std::shared_ptr<Communicator> activations_, gradients_;
  std::vector<Link> activation_links_, gradient_links_;
  std::vector<Pass> passes_;
  std::vector<PipelineSimulation::Span> spans_;
  double loss_ = 0;
  KernelProfile* profile_ = nullptr;
};

}  // namespace shoal
