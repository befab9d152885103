// What a configuration will take, before it runs: the training step itself, on tensors that have
// sizes but no memory, over a communicator that counts.
#pragma once

#include <string>
#include <vector>

#include "launch/config.h"
#include "launch/dry_run.h"
#include "launch/knobs.h"
#include "parallel/pipeline_simulator.h"

namespace shoal {

struct Plan {
  BatchPlan batch;
  int64_t parameters = 0;  // a tied head once
  int64_t tokens_per_step = 0;
  int64_t steps_per_epoch = 0;      // 0 if the data was not opened
  double flops_per_token = 0;       // 6 N_matmul + 6 L d T (causal)
  double flops_per_token_full = 0;  // with 12 L d T, as often quoted
  TrainingOptions options;
  std::vector<RankPlan> ranks;
  std::vector<int> stages;        // bounds of the pipeline's stages in the model's segments
  PipelineSimulation pipeline;    // of a step, in FLOPs
  std::optional<int64_t> budget;  // memory.budget
  int64_t available = 0;          // memory of this machine, over the ranks on it

  MemoryReport at_peak;       // of the rank with the highest
  std::vector<Trial> trials;  // what single changes would make of it

  int64_t staging = 0;  // of a save that is written behind training, at most

  int64_t peak() const;  // the largest rank's, without staging
  int64_t limit() const;
  bool fits() const;
};

// Bytes of a parameter's states: its value, its gradient, and what the optimizer keeps.
struct StateBytes {
  double value, gradient, optimizer;
  // Of `parameters` on each of `ranks` ranks, by ZeRO's formulas (arXiv 1910.02054, section 5).
  double PerRank(double parameters, int stage, int ranks) const;
};
StateBytes StatesOf(const TrainingOptions& options);

// The passes of a step on a clock of FLOPs; messages take no time.
PipelineSimulation SimulateStep(const TrainingOptions& options);

// `config` is resolved and supported, `options` are made of it. Each rank has as many threads as
// the caller.
Plan MakePlan(const Config& config, const TrainingOptions& options, int ranks);

// {"ranks": [{"rank", "bytes": {class..., "peak"}, "wire_bytes": {axis...}}], "bubble", "fits",
// "peak_tensors": [{"count", "bytes", ...}], "peak_modules": {module...}, "single_changes": [...],
// ...}
std::string PlanJson(const Plan& plan);
// Error(kConfig) if `plan` does not fit, naming what would make it; memory.overcommit starts
// anyhow.
void CheckFits(const Plan& plan, const Config& config);
std::string PlanText(const Plan& plan, const Config& config);

}  // namespace shoal
