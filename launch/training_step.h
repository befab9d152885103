// One optimizer step: forward and backward over micro-batches, the gradient's sum over ranks,
// clipping, the update. Knows models, parallelism and optimizers; no files, no configuration.
#pragma once

#include <memory>
#include <span>

#include "core/state_dict.h"
#include "data/loader.h"
#include "memory/compress_activations.h"
#include "models/registry.h"
#include "optim/zero/zero.h"
#include "parallel/pipeline.h"
#include "parallel/sequence_attention.h"
#include "parallel/tensor_parallel.h"

namespace shoal {

struct TrainingOptions {
  ModelConfig model;
  DType compute = DType::kF32;  // of parameters and activations; f32 and f64 are their own masters
  bool split_master = false;    // of parameters; see ZeroOptions
  DType gradients = DType::kF32;  // of parameters' gradients
  UpdateRuleOptions rule;
  double clip = 0;  // global norm; 0: never
  uint64_t seed = 1;
  MeshShape mesh = {.dp = 0};      // dp 0: fills the ranks there are
  bool sequence_parallel = false;  // norms and residuals by tokens over tp
  int zero_stage = 0;
  int shard_ranks = 0;  // see ZeroOptions
  int64_t bucket_bytes = ZeroOptions().bucket_bytes;
  bool update_in_backward = false;  // each bucket when its gradient is final: no clipping
  bool contiguous_gradients = false;
  bool offload_host = false;      // the optimizer's states; see ZeroOptions
  std::string offload_dir;        // of the optimizer's states; empty: they are in memory
  bool activations_host = false;  // activations between forward and backward
  std::string activations_dir;    // of activations between forward and backward; the same
  ActivationFormat compress_activations = ActivationFormat::kOwn;
  // How backward gets the activations of this many of a rank's blocks, from its first.
  struct Recompute {
    int full = 0, selective = 0;
  };
  std::vector<Recompute> recompute;    // by rank of the pipeline; empty: all are kept
  bool partition_activations = false;  // over tp
  int64_t mlp_chunk_rows = 0;          // of a rank, that an MLP works on at a time; 0: all
  SequenceOptions sequence;            // of attention over cp
  std::string schedule = "1f1b";       // of the pipeline: a kind, or a file
  int virtual_stages = 1;
  std::vector<int> blocks_per_stage;  // of the pipeline; empty: as SegmentCosts balance
  int micro_batches = 1;              // per step and replica
  int64_t length = 0;                 // tokens of a sequence, for the balance
};

// Every block of every stage whole, or (not `full`) selectively.
std::vector<TrainingOptions::Recompute> RecomputeEvery(bool full, const TrainingOptions& options);

// The order of a step's passes; Error(kConfig) if there is none for so many ranks and
// micro-batches.
PipelineSchedule ScheduleOf(const TrainingOptions& options, int micro_batches);
// Bounds of the pipeline's stages in the model's segments.
std::vector<int> StagesOf(const TrainingOptions& options);

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
    // False: loss or norm is not finite, and nothing but this has happened; except where updates
    // happen in backward: then parameters and states may be no numbers either.
    bool updated = true;
  };
  // `micro_batches`: this replica's share of the step, whole sequences. Collective.
  Result Run(std::span<const Batch> micro_batches, double lr);
  // Called in Run before parameters and optimizer states change: between the passes and the update,
  // or before the passes.
  void set_before_update(std::function<void()> call) { before_update_ = std::move(call); }

  // Sum of the labels' negative log likelihoods of this replica's batch, without dropout. The ranks
  // of a replica call it together.
  double SumLoss(const Batch& batch);

  int blocks() const { return blocks_; }  // of this rank
  // How attention crossed ranks in the last forward, and why so; empty if cp is 1.
  std::string DescribeAttention() const {
    return sequence_ == nullptr ? "" : sequence_->Describe();
  }
  LanguageModel& model() { return *model_; }
  ZeroOptimizer& optimizer() { return *optimizer_; }
  const Mesh& mesh() const { return mesh_; }
  const PipelineExecutor& pipeline() const { return *executor_; }
  const SequenceGroup* sequence() const { return sequence_.get(); }
  // Sent by this rank so far over an axis; control scalars are counted apart.
  int64_t wire_bytes(MeshAxis axis) const;
  void set_profile(KernelProfile* profile);
  // What is here of parameters, and of what the optimizer keeps of them. `once`: what several ranks
  // hold is named by one of them alone, for a save.
  StateDict State(bool once = false);
  // All parameters of the model, of other stages too.
  struct Known {
    std::string name;
    Dims shape;
  };
  const std::vector<Known>& parameters() const { return known_; }
  // One of them as a whole, in row-major order, after ZeroOptimizer::GatherParameters. Collective
  // over the ranks of this replica.
  std::vector<double> Whole(const Known& parameter);

 private:
  void ChunkMlps();
  void TieHead();
  PipelineExecutor& Executor(int micro_batches);
  // The part of the model that is stage `chunk` of this rank.
  Tensor Forward(const Batch& batch, int chunk, const Tensor& in, double normalizer, bool training);
  Tensor Boundary(const Batch& batch) const;
  Batch Mine(const Batch& batch) const;
  Placement OfReplica() const;

  TrainingOptions options_;
  Mesh mesh_;
  std::shared_ptr<LanguageModel> model_;
  std::vector<Known> known_;
  std::unique_ptr<PipelineExecutor> executor_;
  int64_t wire_before_ = 0;                    // of executors before this one
  std::vector<std::pair<int, int>> segments_;  // by chunk
  int blocks_ = 0;
  std::function<void(int64_t)> begin_;       // a forward over so many tokens
  std::shared_ptr<SequenceGroup> sequence_;  // null if cp is 1
  int64_t tokens_ = 0;                       // of the forward that began last
  bool documents_ = false;                   // whether batches have them: also where no rows are
  std::unique_ptr<Communicator> tied_;       // the stages that hold a tied head's weight
  KernelProfile* profile_ = nullptr;
  SavedTensorHooks keep_;  // of activations; none: they stay as they are
  std::function<void()> before_update_;
  std::unique_ptr<ZeroOptimizer> optimizer_;
};

}  // namespace shoal
