// A pipeline schedule on a virtual clock, and pictures of it. Times have any one unit; they are
// sums of the given ones, exact if these are whole numbers.
#pragma once

#include <string>
#include <vector>

#include "parallel/pipeline_schedule.h"

namespace shoal {

// Times of a stage's passes: one for all stages, or one for each. A whole backward pass takes the
// sum of its halves.
struct PipelineCosts {
  std::vector<double> forward = {1}, backward_input = {1}, backward_weight = {1};
  double link = 0;  // of a message: it arrives this long after it was sent, whatever else is sent
};

struct PipelineSimulation {
  struct Span {
    double start, end;
  };
  PipelineSchedule schedule;
  PipelineCosts costs;  // with one time for each stage
  // As schedule.actions. A receive is the time that the rank waits for; a send takes none.
  std::vector<std::vector<Span>> spans;
  std::vector<double> busy;  // by rank: in passes
  double makespan = 0;
  // makespan / ideal - 1, where ideal is the time of the busiest rank: (p-1)/m for 1f1b, see
  // parallel/pipeline_schedule.h. The share of the whole step is bubble / (1 + bubble).
  double bubble = 0;
  // The largest idle time of a rank between its own first and last pass, over ideal: the bubble if
  // steps follow each other without a barrier, as papers on zero bubbles have it.
  double inner_bubble = 0;
  PipelineFacts facts;
};

// Checks the schedule first.
PipelineSimulation SimulatePipeline(const PipelineSchedule& schedule, const PipelineCosts& costs);

// A line for each rank, a column for the time of the shortest pass (no less than a thousandth of
// the step; shorter passes may then be left out).
std::string DrawPipelineTimeline(const PipelineSimulation& simulation);
// The same as a picture, whole in itself.
std::string DrawPipelineTimelineSvg(const PipelineSimulation& simulation);

}  // namespace shoal
