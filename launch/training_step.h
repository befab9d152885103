// One optimizer step: forward and backward over micro-batches, the gradient's sum over ranks,
// clipping, the update. Knows models, data parallelism and optimizers; no files, no configuration.
#pragma once

#include <memory>
#include <span>

#include "core/state_dict.h"
#include "data/loader.h"
#include "models/registry.h"
#include "optim/optimizer.h"
#include "parallel/data_parallel.h"

namespace shoal {

struct TrainingOptions {
  ModelConfig model;
  DType compute = DType::kF32;  // of parameters and activations; f32 and f64 are their own masters
  DType gradients = DType::kF32;  // of parameters' gradients
  UpdateRuleOptions rule;
  double clip = 0;  // global norm; 0: never
  uint64_t seed = 1;
};

class TrainingStep {
 public:
  // Builds the model and its optimizer on the current context's device.
  TrainingStep(const TrainingOptions& options, Communicator& communicator);

  struct Result {
    double loss = 0;       // mean over the global tokens, before the update
    double grad_norm = 0;  // global, before clipping
    int64_t tokens = 0;    // labelled, over all ranks
  };
  // `micro_batches`: this rank's share of the step. Collective.
  Result Run(std::span<const Batch> micro_batches, double lr);

  // Sum of the labels' negative log likelihoods, on this rank alone, without dropout.
  double SumLoss(const Batch& batch);

  LanguageModel& model() { return *model_; }
  Optimizer& optimizer() { return *optimizer_; }
  // Parameters, and what the optimizer keeps of them.
  StateDict State();
  // Whether no value of State() is infinite or NaN.
  bool AllFinite();

 private:
  Tensor Loss(const Batch& batch, double normalizer, bool training);

  TrainingOptions options_;
  Communicator& communicator_;
  std::shared_ptr<LanguageModel> model_;
  std::unique_ptr<DataParallel> data_parallel_;
  std::unique_ptr<Optimizer> optimizer_;
};

}  // namespace shoal
