// From a configuration to what it names: the corpus, the model's options, a save. Shared by the
// commands.
#pragma once

#include <memory>
#include <string>

#include "checkpoint/store.h"
#include "data/loader.h"
#include "launch/config.h"
#include "launch/dry_run.h"

namespace shoal {

struct OpenedData {
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Loader> loader;
  std::string fingerprint;
};

// Opens data.path. What only the data can say (model.vocab) is filled into `config`.
OpenedData OpenData(Config* config);

DType ComputeDType(const std::string& precision);  // as precision.compute names it
DType ComputeDType(const Config& config);
TrainingOptions MakeTrainingOptions(const Config& config, const BatchPlan& plan);
PassShape PassOf(const Config& config, const BatchPlan& plan);
// A rank's share of this machine's memory, if `ranks` run on it.
int64_t MemoryOfRank(int ranks);
// That of a rank of `communicator`. Collective.
int64_t MemoryOfRank(Communicator& communicator);
// From now on this rank's tensors take `bytes` at most, in memory of the host: Error(kMemory).
void LimitMemory(int64_t bytes);

// What replica `replica` computes in step `step` (from 1), a batch per pass. After a rollback a run
// reads other batches than its steps' own: `step` is then the batch's.
std::vector<Batch> StepBatches(const Config& config, const BatchPlan& plan, const Loader& loader,
                               int64_t step, int64_t replica);

using Warn = std::function<void(const std::string&)>;
inline void Ignore(const std::string&) {}  // what is warned of
// Saves that may be read, newest first: those of a run whose manifest and file sizes are right (the
// others are named to `warn`), or `path` itself if it is a save or a Hugging Face
// directory. Error(kStorage) with the reason of
// each if there is none.
std::vector<std::string> FindSaves(const std::string& path, const Warn& warn);
// The newest of them whose every byte is as it was written.
std::string FindSave(const std::string& path, const Warn& warn);
// Calls `load` on every rank with the newest of them, and with the next older one where it throws
// Error(kStorage) on any: all ranks go on from the same save, whose path is returned. Every damage
// is named to `warn`, or if no save is left in Error(kStorage). Collective.
std::string LoadNewest(const std::string& path, Communicator& communicator, const Warn& warn,
                       const std::function<void(const std::string&)>& load);

// A configuration that says what a model of this shape is, and nothing of its training or data.
Config WeightsConfig(const ModelConfig& shape, const std::string& tokenizer, DType dtype);

// A model to read from, by what FindSaves gave: its configuration as it was trained (data.path is
// empty where only weights are known), and its weights in `compute`.
struct LoadedModel {
  Config config;
  std::shared_ptr<LanguageModel> model;
};
LoadedModel LoadModel(const std::string& save, std::optional<DType> compute = std::nullopt);

// If model.from is set: takes the shape from the newest save there into `config`.
void ResolveFrom(Config* config);
// And the weights, as LoadNewest; from then on model.from names the save that they are of.
// Collective.
void LoadWeights(Config* config, Communicator& communicator, const Warn& warn, TrainingStep& step);

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
