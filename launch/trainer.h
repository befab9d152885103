// A run from its first step to its last: data, steps, validation, saves, metrics. The numbers are
// TrainingStep's; this adds everything that touches the disk and the terminal.
#pragma once

#include <string>

#include "launch/config.h"
#include "parallel/communicator.h"

namespace shoal {

// Both are collective and return the exit code of the program: 0, or 75 if the run was asked to
// stop and has saved. Errors are thrown, the same on every rank where the cause can be agreed on.

// Starts the run that `config` describes in a new run directory.
int Train(Config config, Communicator& communicator);
// Goes on after the newest save that every rank finds whole. A finished run is left as it is.
int Resume(const std::string& run, Communicator& communicator);

}  // namespace shoal
