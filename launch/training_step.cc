#include "launch/training_step.h"

#include <cmath>

#include "core/init.h"
#include "kernels/reduce.h"

namespace shoal {

TrainingStep::TrainingStep(const TrainingOptions& options, Communicator& communicator)
    : options_(options), communicator_(communicator), model_(BuildModel(options.model)) {
  MaterializeParameters(*model_, options.compute, options.seed);
  const auto parameters = model_->Parameters();
  for (const auto& parameter : parameters) parameter->leaf().grad_dtype = options.gradients;
  data_parallel_ = std::make_unique<DataParallel>(parameters, communicator);
  optimizer_ = std::make_unique<Optimizer>(parameters, options.rule);
}

Tensor TrainingStep::Loss(const Batch& batch, double normalizer, bool training) {
  const Dims shape = {batch.count, batch.length};
  SequenceInfo info;
  info.positions = Tensor::From(batch.positions, shape);
  if (!batch.documents.empty()) info.documents = Tensor::From(batch.documents, shape);
  info.token_numbers = Tensor::From(batch.token_numbers, {batch.count * batch.length});
  info.seed = options_.seed;
  info.training = training;
  const Tensor hidden = model_->Hidden(Tensor::From(batch.tokens, shape), info);
  return model_->Loss(hidden, Tensor::From(batch.labels, shape), normalizer);
}

TrainingStep::Result TrainingStep::Run(std::span<const Batch> micro_batches, double lr) {
  // The one normaliser of the step: a mean of micro-batch means would weigh tokens unequally.
  int64_t labelled = 0;
  for (const Batch& batch : micro_batches) labelled += batch.labelled;
  Result result;
  result.tokens = static_cast<int64_t>(communicator_.Sum(static_cast<double>(labelled)));
  const double normalizer = static_cast<double>(std::max<int64_t>(result.tokens, 1));
  double loss = 0;
  for (size_t i = 0; i < micro_batches.size(); ++i) {
    const Tensor share = Loss(micro_batches[i], normalizer, true);
    BackwardOptions backward;
    backward.final_micro_batch = i + 1 == micro_batches.size();
    Backward(share, {}, backward);
    loss += share.Item();
  }
  data_parallel_->Finish();
  result.loss = communicator_.Sum(loss);
  result.grad_norm = optimizer_->GradNorm();
  optimizer_->Step(lr, ClipScale(result.grad_norm, options_.clip));
  return result;
}

double TrainingStep::SumLoss(const Batch& batch) {
  const NoGrad no_grad;
  return Loss(batch, 1, false).Item();
}

StateDict TrainingStep::State() {
  StateDict state = ModelState(*model_);
  for (const Optimizer::State& s : optimizer_->States()) {
    state.push_back({"optim/" + s.name + "/" + s.parameter->name(), s.tensor,
                     s.parameter->global_shape(), s.parameter->offset()});
  }
  return state;
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
