// From a configuration to what it names: the corpus, the model's options, a save. Shared by the
// commands.
#pragma once

#include <memory>
#include <string>

#include "checkpoint/store.h"
#include "data/loader.h"
#include "launch/config.h"
#include "launch/training_step.h"

namespace shoal {

struct OpenedData {
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Loader> loader;
  std::string fingerprint;
};

// Opens data.path. What only the data can say (model.vocab) is filled into `config`.
OpenedData OpenData(Config* config);

DType ComputeDType(const Config& config);  // of precision.compute
TrainingOptions MakeTrainingOptions(const Config& config, const BatchPlan& plan);

// What replica `replica` computes in step `step` (from 1), a batch per pass. After a rollback a run
// reads other batches than its steps' own: `step` is then the batch's.
std::vector<Batch> StepBatches(const Config& config, const BatchPlan& plan, const Loader& loader,
                               int64_t step, int64_t replica);

using Warn = std::function<void(const std::string&)>;
// Saves that may be read, newest first: those of a run whose manifest and file sizes are right (the
// others are named to `warn`), or `path` itself if it is a save. Error(kStorage) with the reason of
// each if there is none.
std::vector<std::string> FindSaves(const std::string& path, const Warn& warn);
// Calls `load` on every rank with the newest of them, and with the next older one where it throws
// Error(kStorage) on any: all ranks go on from the same save, whose path is returned. Every damage
// is named to `warn`, or if no save is left in Error(kStorage). Collective.
std::string LoadNewest(const std::string& path, Communicator& communicator, const Warn& warn,
                       const std::function<void(const std::string&)>& load);

// A model to read from: its configuration as it was trained, and its weights in `compute`.
struct LoadedModel {
  Config config;
  std::shared_ptr<LanguageModel> model;
};
LoadedModel LoadModel(const std::string& save, std::optional<DType> compute = std::nullopt);

// If model.from is set: takes the shape from there into `config`. The weights: LoadWeights.
void ResolveFrom(Config* config);
void LoadWeights(const Config& config, TrainingStep& step);

// The mean loss over a share of `count` sequences, which `batch(first, count)` reads: each rank
// takes a part, `micro` at a time. Collective.
struct Evaluation {
  double loss = 0;
  int64_t tokens = 0;
};
Evaluation Evaluate(int64_t sequences, int64_t micro, Communicator& communicator,
                    const std::function<Batch(int64_t, int64_t)>& batch,
                    const std::function<double(const Batch&)>& sum_loss);

}  // namespace shoal
