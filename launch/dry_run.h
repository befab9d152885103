// The training step itself on tensors that have sizes but no memory, over a communicator that
// counts: what a rank will take, and what it could do about it.
#pragma once

#include <array>

#include "core/allocator.h"
#include "launch/training_step.h"

namespace shoal {

// One pass of a replica.
struct PassShape {
  int64_t sequences = 1;
  bool documents = false;  // then attention over cp is planned as if each sequence were one
};

struct RankPlan {
  int rank = 0;
  int blocks = 0;                                  // that it holds
  MemoryStats memory;                              // peaks of one step
  std::array<int64_t, kMeshAxes> wire_bytes = {};  // sent per step, by axis
  std::string attention;  // how it crosses ranks, and why; empty if it does not
};

// What rank `rank` of options.mesh.ranks() does in one step. It has as many threads as the caller:
// kernels take scratch for each. `at_peak`, if given, becomes what was alive at the peak.
RankPlan DryRun(const TrainingOptions& options, const PassShape& pass, int rank,
                std::vector<LiveBlock>* at_peak = nullptr);

// FLOPs per token that the choice computes again, over one rank's blocks; a byte of memory traffic
// counts as the FLOPs that are done meanwhile.
double RecomputeCost(const TrainingOptions& options, const TrainingOptions::Recompute& blocks);

// Recomputes no more blocks than it takes for every rank's peak to be at most `budget` bytes: of
// all choices of how many blocks are run again whole, from the first, and how many selectively
// behind them, the one that costs least by counted FLOPs and bytes. Fills options->recompute.
// Error(kConfig) if even all of them are not enough.
void ChooseRecompute(TrainingOptions* options, const PassShape& pass, int64_t budget);

}  // namespace shoal
