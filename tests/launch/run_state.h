// A run's state to a save and back, as the program does it, without the program.
#pragma once

#include <string>

#include "checkpoint/masters.h"
#include "checkpoint/store.h"
#include "launch/training_step.h"

namespace shoal::testing {

// Every rank's part after `steps` steps; rank 0 gets the save's path.
inline std::string SaveRun(TrainingStep& step, Communicator& c, const std::string& directory,
                           int64_t steps) {
  std::string path;
  if (c.rank() == 0) BeginSave(directory, steps);
  c.Barrier();
  const auto parts = c.AllGatherStrings(WritePart(directory, steps, c.rank(), step.State(true)));
  if (c.rank() == 0) path = CommitSave(directory, {steps, 0, "", ""}, parts);
  c.Barrier();
  return path;
}

inline void LoadRun(TrainingStep& step, const std::string& save, int64_t steps) {
  LoadRunState(save, step.State());
  step.optimizer().set_step(steps);
  step.optimizer().ShareValues();
}

}  // namespace shoal::testing
