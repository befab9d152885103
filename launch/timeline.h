// A pipeline's last step as it was, beside what its FLOPs would have it be: pictures for the
// report.
#pragma once

#include <string>

#include "launch/training_step.h"

namespace shoal {

// Writes {"predicted": svg, "measured": svg} of the first replica's stages to `path`, on rank 0.
// Collective over `world`, whose ranks share a host: their clock must be one.
void WriteTimeline(const TrainingStep& step, const TrainingOptions& options, Communicator& world,
                   const std::string& path);

// The part of a report's page that shows them; empty if there is no such file.
std::string TimelineHtml(const std::string& path);

}  // namespace shoal
