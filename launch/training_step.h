// One optimizer step: forward and backward over micro-batches, the gradient's sum over ranks,
// clipping, the update. Knows models, parallelism and optimizers; no files, no configuration.
#pragma once

#include <memory>
#include <span>

#include "core/state_dict.h"
#include "data/loader.h"
#include "models/registry.h"
#include "optim/zero/zero.h"
#include "parallel/tensor_parallel.h"

namespace shoal {

struct TrainingOptions {
  ModelConfig model;
  DType compute = DType::kF32;  // of parameters and activations; f32 and f64 are their own masters
  DType gradients = DType::kF32;  // of parameters' gradients
  UpdateRuleOptions rule;
  double clip = 0;  // global norm; 0: never
  uint64_t seed = 1;
  MeshShape mesh = {.dp = 0};      // dp 0: fills the ranks there are
  bool sequence_parallel = false;  // norms and residuals by tokens over tp
  int zero_stage = 0;
  int shard_ranks = 0;  // see ZeroOptions
  int64_t bucket_bytes = ZeroOptions().bucket_bytes;
  std::string offload_dir;
};

// How `tp` ranks share a model; Error(kConfig) if they cannot.
AxisCut Cut(const ModelConfig& model, int tp);

class TrainingStep {
 public:
  // Builds the model and its optimizer on the current context's device. Collective over `world`,
  // which must outlive it.
  TrainingStep(const TrainingOptions& options, Communicator& world);

  struct Result {
    double loss = 0;       // mean over the global tokens, before the update
    double grad_norm = 0;  // global, before clipping
    int64_t tokens = 0;    // labelled, over all ranks
  };
  // `micro_batches`: this rank's share of the step. Collective.
  Result Run(std::span<const Batch> micro_batches, double lr);

  // Sum of the labels' negative log likelihoods of this replica's batch, without dropout. Ranks
  // that share a model call it together.
  double SumLoss(const Batch& batch);

  LanguageModel& model() { return *model_; }
  ZeroOptimizer& optimizer() { return *optimizer_; }
  const Mesh& mesh() const { return mesh_; }
  // Sent by this rank so far over an axis; control scalars are counted apart.
  int64_t wire_bytes(MeshAxis axis) const;
  void set_profile(KernelProfile* profile);
  // What is here of parameters, and of what the optimizer keeps of them. `once`: what several ranks
  // hold is named by one of them alone, for a save.
  StateDict State(bool once = false);
  // A parameter as a whole, in row-major order. Its slice is here
  // (ZeroOptimizer::GatherParameters). Collective over the ranks of this replica.
  std::vector<double> Whole(const Parameter& parameter);
  // Whether no value of State() is infinite or NaN.
  bool AllFinite();

 private:
  Tensor Loss(const Batch& batch, double normalizer, bool training);

  TrainingOptions options_;
  Mesh mesh_;
  std::shared_ptr<LanguageModel> model_;
  std::unique_ptr<ZeroOptimizer> optimizer_;
};

}  // namespace shoal
