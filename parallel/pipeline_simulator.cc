#include "parallel/pipeline_simulator.h"

#include <algorithm>
#include <cmath>

#include "core/base/error.h"

namespace shoal {
namespace {

void OneForEach(std::vector<double>& times, int stages, const char* what) {
  if (times.size() == 1) times.resize(static_cast<size_t>(stages), times[0]);
  SHOAL_CHECK(std::ssize(times) == stages, "pipeline", "{} times for {} stages: {}", times.size(),
              stages, what);
  for (const double time : times)
    SHOAL_CHECK(time >= 0 && std::isfinite(time), "pipeline", "a time of {}: {}", time, what);
}

double PassTime(const PipelineCosts& costs, PipelineOp op, int stage) {
  const auto s = static_cast<size_t>(stage);
  switch (op) {
    case PipelineOp::kForward:
      return costs.forward[s];
    case PipelineOp::kBackward:
      return costs.backward_input[s] + costs.backward_weight[s];
    case PipelineOp::kBackwardInput:
      return costs.backward_input[s];
    case PipelineOp::kBackwardWeight:
      return costs.backward_weight[s];
    default:
      return 0;
  }
}

}  // namespace

PipelineSimulation SimulatePipeline(const PipelineSchedule& schedule, const PipelineCosts& costs) {
  PipelineSimulation out{.schedule = schedule, .costs = costs};
  out.facts = CheckPipelineSchedule(schedule);
  const int stages = schedule.stages();
  OneForEach(out.costs.forward, stages, "forward");
  OneForEach(out.costs.backward_input, stages, "backward_input");
  OneForEach(out.costs.backward_weight, stages, "backward_weight");
  SHOAL_CHECK(costs.link >= 0 && std::isfinite(costs.link), "pipeline", "a time of {}: link",
              costs.link);

  out.spans.resize(schedule.actions.size());
  out.busy.assign(schedule.actions.size(), 0);
  std::vector<double> clock(schedule.actions.size(), 0), begin(schedule.actions.size(), -1);
  std::vector<double> arrival(2 * static_cast<size_t>(stages) *
                              static_cast<size_t>(schedule.micro_batches));
  WalkPipeline(schedule, [&](int rank, size_t i) {
    const auto r = static_cast<size_t>(rank);
    const PipelineAction& action = schedule.actions[r][i];
    const double start = clock[r];
    if (IsMessage(action.op)) {
      double& at = arrival[static_cast<size_t>(schedule.Message(rank, action))];
      if (IsSend(action.op))
        at = start + costs.link;
      else
        clock[r] = std::max(start, at);
    } else {
      const double time = PassTime(out.costs, action.op, schedule.Stage(rank, action.chunk));
      if (begin[r] < 0) begin[r] = start;
      clock[r] += time;
      out.busy[r] += time;
    }
    out.spans[r].push_back({start, clock[r]});
  });

  out.makespan = *std::ranges::max_element(clock);
  const double ideal = *std::ranges::max_element(out.busy);
  double idle = 0;
  for (size_t r = 0; r < clock.size(); ++r)
    idle = std::max(idle, clock[r] - begin[r] - out.busy[r]);
  // Passes that take no time have no bubble, unless links do.
  if (ideal > 0) {
    out.bubble = out.makespan / ideal - 1;
    out.inner_bubble = idle / ideal;
  }
  return out;
}

}  // namespace shoal
