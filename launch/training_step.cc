#include "launch/training_step.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <numeric>
#include <optional>
#include <sstream>

#include "core/base/mutation.h"
#include "core/init.h"
#include "memory/chunked_mlp.h"
#include "memory/offload_activations.h"
#include "memory/recompute.h"
#include "optim/clip.h"
#include "parallel/partitioned_activations.h"
#include "parallel/tensor_parallel.h"

namespace shoal {

namespace {

// Whether this rank holds a token of a test's choice.
bool Poisoned(std::span<const Batch> batches) {
  const int64_t first = poisoned_token.load(), end = first + poisoned_tokens.load();
  return std::any_of(batches.begin(), batches.end(), [&](const Batch& batch) {
    return std::any_of(batch.token_numbers.begin(), batch.token_numbers.end(),
                       [&](int64_t token) { return first <= token && token < end; });
  });
}

std::vector<int64_t> StartsOf(const Batch& batch) {
  std::vector<int64_t> starts = batch.sequence_starts;
  for (int64_t b = std::ssize(starts); b < batch.count; ++b)
    starts.push_back(batch.token_numbers[static_cast<size_t>(b * batch.length)]);
  return starts;
}

MeshShape Filled(MeshShape shape, int ranks) {
  if (shape.dp == 0) shape.dp = ranks / (shape.tp * shape.pp * shape.cp);
  return shape;
}

}  // namespace

AxisCut Cut(const ModelConfig& model, int tp) {
  return CutTransformer(tp, model.heads, model.kv_heads, model.head_dim, model.mlp, model.vocab);
}

std::vector<TrainingOptions::Recompute> RecomputeEvery(bool full, const TrainingOptions& options) {
  const auto layers = static_cast<int>(options.model.layers);
  const TrainingOptions::Recompute every = {full ? layers : 0, full ? 0 : layers};
  return std::vector(static_cast<size_t>(options.mesh.pp), every);
}

PipelineSchedule ScheduleOf(const TrainingOptions& options, int micro_batches) {
  const int ranks = options.mesh.pp, chunks = options.virtual_stages;
  if (!options.schedule.ends_with(".csv"))
    return MakePipelineSchedule(options.schedule, ranks, chunks, micro_batches);
  std::ifstream file(options.schedule);
  std::stringstream text;
  text << file.rdbuf();
  if (!file)
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline", "pipeline.schedule {} cannot be read: {}",
               options.schedule, std::strerror(errno));
  return ParsePipelineSchedule(text.str(), options.schedule, ranks, chunks, micro_batches);
}

std::vector<int> StagesOf(const TrainingOptions& options) {
  const int stages = options.mesh.pp * options.virtual_stages;
  if (options.blocks_per_stage.empty())
    return CutIntoStages(SegmentCosts(options.model, options.length), stages);
  const std::vector<int>& blocks = options.blocks_per_stage;
  const auto layers = static_cast<int>(options.model.layers);
  const int sum = std::accumulate(blocks.begin(), blocks.end(), 0);
  const bool alone = stages > 1 || blocks.size() != 1;
  if (static_cast<int>(blocks.size()) != stages || sum != layers ||
      std::any_of(blocks.begin(), blocks.end(), [](int n) { return n < 0; }) ||
      (alone && std::any_of(blocks.begin() + 1, blocks.end() - 1, [](int n) { return n == 0; })))
    SHOAL_FAIL(ErrorKind::kConfig, "pipeline",
               "pipeline.blocks gives {} blocks to {} stages: it must give the model's {} to {} "
               "(mesh.pp x pipeline.virtual_stages), at least one to those in the middle",
               sum, blocks.size(), layers, stages);
  // The embedding belongs to the first, the norm and the head to the last.
  std::vector<int> bounds = {0};
  for (const int n : blocks) bounds.push_back((bounds.size() == 1 ? 1 : bounds.back()) + n);
  bounds.back() = layers + LanguageModel::kOtherSegments;
  return bounds;
}

TrainingStep::TrainingStep(const TrainingOptions& options, Communicator& world)
    : options_(options),
      mesh_(world, Filled(options.mesh, world.size())),
      model_(BuildModel(options.model)) {
  for (const auto& p : model_->Parameters()) known_.push_back({p->name(), p->global_shape()});
  segments_ = Executor(options.micro_batches).Segments(StagesOf(options));
  std::vector<bool> kept(static_cast<size_t>(model_->segments()));
  std::vector<Module*> blocks;
  for (const auto& [begin, end] : segments_) {
    for (int s = begin; s < end; ++s) {
      kept[static_cast<size_t>(s)] = true;
      if (s > 0 && s + 1 < model_->segments())
        blocks.push_back(model_->blocks()[static_cast<size_t>(s) - 1].get());
    }
  }
  blocks_ = static_cast<int>(blocks.size());
  model_->Keep(kept);
  begin_ = ApplyTensorParallel(*model_, Cut(options.model, mesh_.shape().tp),
                               mesh_.axis(MeshAxis::kTp), options.sequence_parallel);
  if (mesh_.shape().cp > 1) {
    sequence_ = ApplySequenceParallel(*model_, options.sequence, mesh_.axis(MeshAxis::kCp));
    sequence_->set_profile(profile_);
  }
  if (options.mlp_chunk_rows > 0) ChunkMlps();
  TieHead();
  if (!options.activations_dir.empty())
    keep_ =
        OffloadActivations(std::make_shared<MappedFile>(options.activations_dir, "activations"));
  // On the CPU host memory is where they are anyhow.
  else if (options.activations_host &&
           ExecutionContext::Current().device().type == DeviceType::kCuda)
    keep_ = OffloadActivationsToHost();
  if (options.compress_activations != ActivationFormat::kOwn)
    keep_ = CompressActivations(options.compress_activations, keep_);
  if (!options.recompute.empty()) {
    const auto [full, selective] =
        options.recompute[static_cast<size_t>(mesh_.coordinate(MeshAxis::kPp))];
    for (int i = 0; i < std::min(full + selective, static_cast<int>(blocks.size())); ++i) {
      Module& block = *blocks[static_cast<size_t>(i)];
      if (i < full)
        ApplyRecompute(block, [this] { return [this, n = tokens_] { begin_(tokens_ = n); }; });
      else
        ApplySelectiveRecompute(block);
    }
  }
  ZeroOptions zero;
  zero.stage = options.zero_stage;
  zero.shard_ranks = options.shard_ranks;
  zero.bucket_bytes = options.bucket_bytes;
  zero.offload_dir = options.offload_dir;
  zero.offload_host = options.offload_host;
  zero.contiguous_gradients = options.contiguous_gradients;
  zero.in_backward = options.update_in_backward;
  zero.compute = options.compute;
  zero.split_master = options.split_master;
  zero.gradients = options.gradients;
  zero.rule = options.rule;
  const bool one_pass = segments_.size() == 1 && mesh_.shape().pp == 1;
  optimizer_ = std::make_unique<ZeroOptimizer>(
      *model_, blocks, mesh_, zero, [&](const Parameter& p) { InitParameter(p, options.seed); },
      [&](const Parameter& p) {
        if (&p == model_->tied_weight() && !one_pass) return ZeroOptimizer::kLate;
        const int segment = model_->SegmentOf(p.name());
        for (size_t chunk = 0; chunk < segments_.size(); ++chunk)
          if (segment >= segments_[chunk].first && segment < segments_[chunk].second)
            return static_cast<int>(chunk);
        SHOAL_FAIL(ErrorKind::kBug, p.name(), "belongs to no stage of this rank");
      });
}

void TrainingStep::ChunkMlps() {
  RowShares shares;
  if (const Communicator& tp = mesh_.axis(MeshAxis::kTp);
      options_.sequence_parallel && tp.size() > 1) {
    shares.ranks = tp.size();
    shares.all = [this] { return tokens_; };
    shares.mine = [&tp](int64_t rows) {
      return ShardBegin(rows, tp.rank() + 1, tp.size()) - ShardBegin(rows, tp.rank(), tp.size());
    };
    shares.announce = begin_;
  }
  std::vector<std::string> mlps;
  model_->Walk([&](const std::string& path, Module&) {
    if (path.starts_with("blocks.") && path.ends_with(".mlp")) mlps.push_back(path);
  });
  for (const std::string& path : mlps)
    ApplyChunkedMlp(*model_, path, options_.mlp_chunk_rows, shares);
}

// A tied weight on two ranks: its gradient is summed over them, and the first one counts.
void TrainingStep::TieHead() {
  Parameter* weight = model_->tied_weight();
  if (weight == nullptr || mesh_.shape().pp == 1) return;
  const PipelineSchedule& schedule = executor_->schedule();
  const int first = schedule.Holder(0).first;
  const int last = schedule.Holder(schedule.stages() - 1).first;
  if (first == last) return;
  Communicator& stages = mesh_.axis(MeshAxis::kPp);
  const bool here = stages.rank() == first || stages.rank() == last;
  std::vector<int> members;
  for (int r = 0; r < stages.size(); ++r)
    if ((r == first || r == last) == here) members.push_back(r);
  tied_ = stages.Subgroup(members);
  if (!here) return;
  if (stages.rank() == last) weight->set_owned(0, 0);
  weight->set_gradient_sum([this](const Tensor& gradient) {
    const View view = gradient.view();
    tied_->AllReduce(std::span(&view, 1));
  });
}

PipelineExecutor& TrainingStep::Executor(int micro_batches) {
  if (executor_ == nullptr || executor_->schedule().micro_batches != micro_batches) {
    if (executor_ != nullptr) wire_before_ += executor_->wire_bytes();
    executor_ = std::make_unique<PipelineExecutor>(ScheduleOf(options_, micro_batches),
                                                   mesh_.axis(MeshAxis::kPp));
    executor_->set_profile(profile_);
  }
  return *executor_;
}

int64_t TrainingStep::wire_bytes(MeshAxis axis) const {
  int64_t bytes = mesh_.wire_bytes(axis);
  if (axis == MeshAxis::kDp) bytes += optimizer_->wire_bytes();
  if (axis == MeshAxis::kCp && sequence_ != nullptr) bytes += sequence_->wire_bytes();
  if (axis == MeshAxis::kPp) {
    bytes += wire_before_ + executor_->wire_bytes();
    if (tied_ != nullptr) bytes += tied_->wire_bytes(Traffic::kData);
  }
  return bytes;
}

void TrainingStep::set_profile(KernelProfile* profile) {
  profile_ = profile;
  mesh_.set_profile(profile);
  optimizer_->set_profile(profile);
  executor_->set_profile(profile);
  if (sequence_ != nullptr) sequence_->set_profile(profile);
}

// Each replica has its own sequences.
Placement TrainingStep::OfReplica() const {
  Placement placement;
  if (mesh_.shape().dp > 1) placement.Set(MeshAxis::kDp, AxisPlacement::Sharded(0));
  if (mesh_.shape().cp > 1) placement.Set(MeshAxis::kCp, AxisPlacement::Sharded(1));
  return placement;
}

// The tokens of each sequence that this rank holds.
Batch TrainingStep::Mine(const Batch& batch) const {
  if (sequence_ == nullptr) return batch;
  const Communicator& cp = mesh_.axis(MeshAxis::kCp);
  const SequenceLayout layout(options_.sequence.layout, batch.length, cp.size());
  const std::vector<int64_t> tokens = layout.Tokens(cp.rank());
  Batch mine;
  mine.count = batch.count;
  mine.length = static_cast<int64_t>(tokens.size());
  const auto cut = [&](const auto& all, auto& part) {
    if (all.empty()) return;
    for (int64_t b = 0; b < batch.count; ++b)
      for (const int64_t t : tokens) part.push_back(all[static_cast<size_t>(b * batch.length + t)]);
  };
  cut(batch.tokens, mine.tokens);
  cut(batch.labels, mine.labels);
  cut(batch.positions, mine.positions);
  cut(batch.documents, mine.documents);
  cut(batch.token_numbers, mine.token_numbers);
  mine.sequence_starts = StartsOf(batch);
  mine.labelled = std::count_if(mine.labels.begin(), mine.labels.end(),
                                [](int32_t label) { return label != kIgnoredLabel; });
  return mine;
}

Tensor TrainingStep::Forward(const Batch& batch, int chunk, const Tensor& in, double normalizer,
                             bool training) {
  const OriginScope here({nullptr, "batch", training ? Pass::kForward : Pass::kNone});
  const Dims shape = {batch.count, batch.length};
  const auto of_replica = [&](Tensor t) {
    t.set_placement(OfReplica());
    return t;
  };
  SequenceInfo info;
  info.positions = of_replica(Tensor::From(batch.positions, shape));
  if (documents_) info.documents = of_replica(Tensor::From(batch.documents, shape));
  info.token_numbers = of_replica(Tensor::From(batch.token_numbers, {batch.count * batch.length}));
  if (training && options_.model.attention_dropout > 0)
    info.sequence_starts = Tensor::From(StartsOf(batch), {batch.count});
  info.seed = options_.seed;
  info.training = training;
  tokens_ = batch.count * batch.length;
  begin_(tokens_);
  std::optional<SavedTensorScope> kept;
  if (options_.partition_activations && training)
    kept.emplace(PartitionActivations(mesh_.axis(MeshAxis::kTp), keep_));
  else if (keep_.pack && training)
    kept.emplace(keep_);
  Tensor x = in;
  const auto [begin, end] = segments_[static_cast<size_t>(chunk)];
  for (int s = begin; s < end; ++s) {
    if (s == 0) {
      x = model_->Embed(of_replica(Tensor::From(batch.tokens, shape)), info);
    } else if (s + 1 < model_->segments()) {
      x = (*model_->blocks()[static_cast<size_t>(s) - 1])(x, info);
    } else {
      x = model_->Loss(model_->Norm(x), of_replica(Tensor::From(batch.labels, shape)), normalizer);
    }
  }
  return x;
}

// [B, T, D], or this rank's rows of it.
Tensor TrainingStep::Boundary(const Batch& batch) const {
  const OriginScope here("boundary");
  const Communicator& tp = mesh_.axis(MeshAxis::kTp);
  Dims shape = {batch.count, batch.length, options_.model.d_model};
  Placement placement = OfReplica();
  if (options_.sequence_parallel && tp.size() > 1) {
    const int64_t tokens = batch.count * batch.length;
    shape = {
        ShardBegin(tokens, tp.rank() + 1, tp.size()) - ShardBegin(tokens, tp.rank(), tp.size()),
        options_.model.d_model};
    placement.Set(MeshAxis::kTp, AxisPlacement::Sharded(0));
    if (mesh_.shape().cp > 1) placement.Set(MeshAxis::kCp, {AxisPlacement::kVarying});
  }
  Tensor t = Tensor::Empty(shape, options_.compute);
  t.set_placement(placement);
  return t;
}

TrainingStep::Result TrainingStep::Run(std::span<const Batch> micro_batches, double lr) {
  std::vector<Batch> cut;
  documents_ = !micro_batches.empty() && !micro_batches[0].documents.empty();
  if (sequence_ != nullptr) {
    for (const Batch& batch : micro_batches) cut.push_back(Mine(batch));
    micro_batches = cut;
  }
  // The one normaliser of the step: a mean of micro-batch means would weigh tokens unequally.
  int64_t labelled = 0;
  for (const Batch& batch : micro_batches) labelled += batch.labelled;
  Result result;
  result.tokens = static_cast<int64_t>(mesh_.data().Sum(static_cast<double>(labelled)));
  double normalizer = static_cast<double>(std::max<int64_t>(result.tokens, 1));
  if (Mutated(Mutation::kInfiniteLoss) && Poisoned(micro_batches))
    normalizer = std::numeric_limits<double>::denorm_min();
  if (Mutated(Mutation::kInfiniteUpdate) && Poisoned(micro_batches))
    lr = std::numeric_limits<double>::infinity();
  const auto at = [&](int i) -> const Batch& { return micro_batches[static_cast<size_t>(i)]; };
  PipelineWork work;
  work.forward = [&](int chunk, int i, const Tensor& in) {
    const double of_mean =
        static_cast<double>(std::max<int64_t>(at(i).labelled, 1) * mesh_.data().size() *
                            static_cast<int64_t>(micro_batches.size()));
    return Forward(at(i), chunk, in,
                   Mutated(Mutation::kMeanOfMicroBatchMeans) ? of_mean : normalizer, true);
  };
  work.boundary = [&](int i) { return Boundary(at(i)); };
  if (options_.update_in_backward && before_update_) before_update_();
  optimizer_->BeginStep(lr);
  work.shared = [&](int chunk, bool last) { optimizer_->FinishPass(chunk, last); };
  const double loss = Executor(static_cast<int>(micro_batches.size())).Run(work);
  optimizer_->FinishStep();
  // The last stage has it.
  result.loss = mesh_.axis(MeshAxis::kPp).Sum(mesh_.data().Sum(loss));
  result.grad_norm = optimizer_->GradNorm();
  // All ranks have the same sums, and so decide the same.
  result.updated = std::isfinite(result.loss) && std::isfinite(result.grad_norm);
  if (!options_.update_in_backward && before_update_) before_update_();
  if (result.updated) {
    optimizer_->Step(lr, ClipScale(result.grad_norm, options_.clip));
  } else {
    optimizer_->DropGradients();
  }
  return result;
}

double TrainingStep::SumLoss(const Batch& batch) {
  const Batch mine = Mine(batch);
  documents_ = !batch.documents.empty();
  PipelineWork work;
  work.forward = [&](int chunk, int, const Tensor& in) {
    return Forward(mine, chunk, in, 1, false);
  };
  work.boundary = [&](int) { return Boundary(mine); };
  const double loss = mesh_.axis(MeshAxis::kPp).Sum(executor_->Forward(work));
  return mesh_.axis(MeshAxis::kCp).Sum(loss);
}

StateDict TrainingStep::State(bool once) {
  StateDict state;
  if (once && optimizer_->replica() != 0) return state;
  for (const ZeroOptimizer::Piece& piece : optimizer_->Pieces(once)) {
    const Parameter& p = *piece.parameter;
    StateEntry entry = {
        piece.state.empty() ? "model/" + p.name() : "optim/" + piece.state + "/" + p.name(),
        piece.tensor, p.global_shape(), p.offset()};
    if (piece.tensor.numel() == p.shape().numel()) {
      entry.tensor = piece.tensor.Reshaped(p.shape());
    } else {
      entry.share = {p.shape(), piece.begin};
    }
    state.push_back(std::move(entry));
  }
  return state;
}

std::vector<double> TrainingStep::Whole(const Known& known) {
  const Dims& global = known.shape;
  SHOAL_CHECK(global.rank() == 1 || global.rank() == 2, known.name, "has shape {}",
              global.ToString());
  std::vector<double> whole(static_cast<size_t>(global.numel()));
  for (const auto& p : model_->Parameters()) {
    if (p->name() != known.name) continue;
    const std::vector<double> here = p->value().ToVector();
    const auto [first, count] = p->owned();
    const int64_t width = std::max<int64_t>(p->shape()[-1], 1);
    for (int64_t i = first; i < first + count; ++i) {
      const int64_t row = global.rank() == 2 ? p->offset()[0] + i / width : 0;
      whole[static_cast<size_t>(row * global[-1] + p->offset()[-1] + i % width)] =
          here[static_cast<size_t>(i)];
    }
  }
  // Every element is owned by one rank.
  const View view(whole.data(), DType::kF64, {global.numel()});
  mesh_.model().AllReduce(std::span(&view, 1), ReduceOp::kSum, Traffic::kControl);
  return whole;
}

}  // namespace shoal
