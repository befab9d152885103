#include "launch/training_step.h"

#include <cmath>

#include "core/base/mutation.h"
#include "core/init.h"
#include "kernels/reduce.h"
#include "optim/clip.h"
#include "parallel/tensor_parallel.h"

namespace shoal {

namespace {

MeshShape Filled(MeshShape shape, int ranks) {
  if (shape.dp == 0) shape.dp = ranks / (shape.tp * shape.pp * shape.cp);
  return shape;
}

}  // namespace

AxisCut Cut(const ModelConfig& model, int tp) {
  return CutTransformer(tp, model.heads, model.kv_heads, model.head_dim, model.mlp, model.vocab);
}

TrainingStep::TrainingStep(const TrainingOptions& options, Communicator& world)
    : options_(options),
      mesh_(world, Filled(options.mesh, world.size())),
      model_(BuildModel(options.model)) {
  ApplyTensorParallel(*model_, Cut(options.model, mesh_.shape().tp), mesh_.axis(MeshAxis::kTp),
                      options.sequence_parallel);
  std::vector<Module*> blocks;
  for (const auto& block : model_->blocks()) blocks.push_back(block.get());
  ZeroOptions zero;
  zero.stage = options.zero_stage;
  zero.shard_ranks = options.shard_ranks;
  zero.bucket_bytes = options.bucket_bytes;
  zero.offload_dir = options.offload_dir;
  zero.compute = options.compute;
  zero.gradients = options.gradients;
  zero.rule = options.rule;
  optimizer_ = std::make_unique<ZeroOptimizer>(
      *model_, blocks, mesh_, zero, [&](const Parameter& p) { InitParameter(p, options.seed); });
}

int64_t TrainingStep::wire_bytes(MeshAxis axis) const {
  return mesh_.wire_bytes(axis) + (axis == MeshAxis::kDp ? optimizer_->wire_bytes() : 0);
}

void TrainingStep::set_profile(KernelProfile* profile) {
  mesh_.set_profile(profile);
  optimizer_->set_profile(profile);
}

Tensor TrainingStep::Loss(const Batch& batch, double normalizer, bool training) {
  const Dims shape = {batch.count, batch.length};
  // Each replica has its own sequences.
  const auto of_replica = [&](Tensor t) {
    Placement placement;
    if (mesh_.shape().dp > 1) placement.Set(MeshAxis::kDp, AxisPlacement::Sharded(0));
    t.set_placement(placement);
    return t;
  };
  SequenceInfo info;
  info.positions = of_replica(Tensor::From(batch.positions, shape));
  if (!batch.documents.empty()) info.documents = of_replica(Tensor::From(batch.documents, shape));
  info.token_numbers = of_replica(Tensor::From(batch.token_numbers, {batch.count * batch.length}));
  info.seed = options_.seed;
  info.training = training;
  const Tensor hidden = model_->Hidden(of_replica(Tensor::From(batch.tokens, shape)), info);
  return model_->Loss(hidden, of_replica(Tensor::From(batch.labels, shape)), normalizer);
}

TrainingStep::Result TrainingStep::Run(std::span<const Batch> micro_batches, double lr) {
  // The one normaliser of the step: a mean of micro-batch means would weigh tokens unequally.
  int64_t labelled = 0;
  for (const Batch& batch : micro_batches) labelled += batch.labelled;
  Result result;
  result.tokens = static_cast<int64_t>(mesh_.data().Sum(static_cast<double>(labelled)));
  const double normalizer = static_cast<double>(std::max<int64_t>(result.tokens, 1));
  double loss = 0;
  for (size_t i = 0; i < micro_batches.size(); ++i) {
    const double of_mean =
        static_cast<double>(std::max<int64_t>(micro_batches[i].labelled, 1) * mesh_.data().size() *
                            static_cast<int64_t>(micro_batches.size()));
    const Tensor share = Loss(
        micro_batches[i], Mutated(Mutation::kMeanOfMicroBatchMeans) ? of_mean : normalizer, true);
    BackwardOptions backward;
    backward.final_micro_batch = i + 1 == micro_batches.size();
    Backward(share, {}, backward);
    loss += share.Item();
    optimizer_->FinishMicroBatch(backward.final_micro_batch);
  }
  result.loss = mesh_.data().Sum(loss);
  result.grad_norm = optimizer_->GradNorm();
  optimizer_->Step(lr, ClipScale(result.grad_norm, options_.clip));
  return result;
}

double TrainingStep::SumLoss(const Batch& batch) {
  const NoGrad no_grad;
  return Loss(batch, 1, false).Item();
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

std::vector<double> TrainingStep::Whole(const Parameter& p) {
  const Dims& global = p.global_shape();
  SHOAL_CHECK(global.rank() == 1 || global.rank() == 2, p.name(), "has shape {}",
              global.ToString());
  const std::vector<double> here = p.value().ToVector();
  std::vector<double> whole(static_cast<size_t>(global.numel()));
  const auto [first, count] = p.owned();
  const int64_t width = std::max<int64_t>(p.shape()[-1], 1);
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t row = global.rank() == 2 ? p.offset()[0] + i / width : 0;
    whole[static_cast<size_t>(row * global[-1] + p.offset()[-1] + i % width)] =
        here[static_cast<size_t>(i)];
  }
  // Every element is owned by one rank.
  const View view(whole.data(), DType::kF64, {global.numel()});
  mesh_.model().AllReduce(std::span(&view, 1), ReduceOp::kSum, Traffic::kControl);
  return whole;
}

bool TrainingStep::AllFinite() {
  const Tensor squares = Tensor::Empty({1}, DType::kF64, MemoryClass::kWorkspace);
  for (const StateEntry& entry : State()) {
    // In f64, so that no finite f32 overflows.
    kernels::SumSquares(ExecutionContext::Current().stream(), squares.view(), entry.tensor.view());
    if (!std::isfinite(squares.Item())) return false;
  }
  return true;
}

}  // namespace shoal
