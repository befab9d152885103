// Changes of one key that may shrink what a rank takes: told apart by what they are for, and tried
// by dry runs.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "launch/config.h"
#include "launch/dry_run.h"
#include "launch/memory_report.h"

namespace shoal {

struct Knob {
  std::string text;  // memory.recompute = "full"
  std::function<void(Config&)> change;
  std::vector<MemoryClass> classes;  // that it may shrink
  bool alone = false;                // not among those that are turned together
};

// Those that are not turned already and have a meaning in this configuration.
std::vector<Knob> KnobsOf(const Config& config, const TrainingOptions& options,
                          const BatchPlan& batch);

// By class, where there is one: "smaller activations: memory.recompute = ..., ...".
std::string KnobText(const std::vector<Knob>& knobs);

struct Trial {
  Knob knob;
  int64_t peak = 0;     // of the largest of the ranks that were tried
  MemoryReport report;  // at it
};

// What rank `rank` takes, and the first and the last, with `change`; none if the change leads to
// an Error(kConfig). What "auto" chose to recompute in `options` is kept.
std::optional<Trial> Try(const Config& config, const TrainingOptions& options, int rank,
                         const Knob& knob);
// Those that lower the peak of `report`'s rank. Names for each line of it the knob that shrinks the
// line and lowers the peak most.
std::vector<Trial> TryAll(const Config& config, const TrainingOptions& options,
                          const BatchPlan& batch, MemoryReport* report);

}  // namespace shoal
