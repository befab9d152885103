// The gradient's norm, the optimizer's states, and the update.
#include <cmath>
#include <optional>

#include "core/base/build_config.h"
#include "core/base/mutation.h"
#include "kernels/copy.h"
#include "kernels/cuda_runtime.h"
#include "kernels/reduce.h"
#include "optim/zero/zero.h"

namespace shoal {
namespace {

const Stream& CurrentStream() { return ExecutionContext::Current().stream(); }

double Total(const Tensor& squares) {
  double sum = 0;
  for (double square : squares.ToVector()) sum += square;
  return sum;
}

// In host memory, without values.
Tensor OnHost(ExecutionContext& host, const View& like) {
  const ContextScope scope(host);
  return Tensor::Empty(like.shape, like.dtype, MemoryClass::kWorkspace);
}

// From this thread's device.
Tensor Fetch(ExecutionContext& host, const View& values) {
  Tensor t = OnHost(host, values);
  if constexpr (kHaveCuda)
    cuda::CopyToHost(CurrentStream().handle, t.view().data, values.data, values.bytes());
  return t;
}

}  // namespace

void ZeroOptimizer::MakeStates(Bucket& bucket) const {
  const DType wide = AccumulatorDType(options_.compute);
  const OriginScope here(bucket.name);
  {
    std::optional<ContextScope> elsewhere;
    if (file_ != nullptr) {
      elsewhere.emplace(file_->context());
    } else if (host_ != nullptr) {
      elsewhere.emplace(*host_);
    }
    if (options_.compute != wide) {
      const OriginScope op("master");
      bucket.master = Tensor::Empty({bucket.share}, options_.split_master ? DType::kI16 : wide,
                                    MemoryClass::kOptimizer);
    }
    const OriginScope op("state");
    for (size_t i = 0; i < rule_->states().size(); ++i)
      bucket.states.push_back(Tensor::Full({bucket.share}, wide, 0, MemoryClass::kOptimizer));
  }
  if (bucket.master.defined()) SetMaster(bucket);
  if (file_ != nullptr) file_->Retire(States(bucket));
}

std::vector<View> ZeroOptimizer::States(const Bucket& bucket) {
  std::vector<View> all;
  if (bucket.master.defined()) all.push_back(bucket.master.view());
  for (const Tensor& state : bucket.states) all.push_back(state.view());
  return all;
}

void ZeroOptimizer::SetMaster(const Bucket& bucket) const {
  if (options_.split_master) {
    kernels::Fill(host_ == nullptr ? CurrentStream() : host_->stream(), bucket.master.view(), 0);
    return;
  }
  for (const Slice& s : bucket.slices) {
    const View master = Flat(bucket.master, s.at, s.count), value = Value(bucket, s);
    if (host_ == nullptr) {
      kernels::Copy(CurrentStream(), master, value);
    } else {
      kernels::Copy(host_->stream(), master, Fetch(*host_, value).view());
    }
  }
}

void ZeroOptimizer::AddSquares(const Bucket& bucket) {
  for (const Slice& s : Owned(bucket)) {
    const int64_t number = number_.at(bucket.parameters[s.parameter]);
    kernels::SumSquares(CurrentStream(), squares_.Narrowed(0, number, 1).view(),
                        Gradient(bucket, s));
  }
}

double ZeroOptimizer::GradNorm() {
  if (!options_.in_backward) ClearSquares();
  for (const Bucket& bucket : buckets_)
    if (bucket.trainable && !options_.in_backward) AddSquares(bucket);
  const Tensor squares = std::exchange(squares_, {});
  if (Mutated(Mutation::kNormOfTheLocalShard)) return std::sqrt(Total(squares));
  const View view = squares.view();
  // Values may be on their way already.
  queue_.Wait(queue_.Post(
      [this, view] { shard_->AllReduce(std::span(&view, 1), ReduceOp::kSum, Traffic::kControl); }));
  mesh_.axis(MeshAxis::kTp).AllReduce(std::span(&view, 1), ReduceOp::kSum, Traffic::kControl);
  // Stages have parameters of their own.
  return std::sqrt(mesh_.axis(MeshAxis::kPp).Sum(Total(squares)));
}

void ZeroOptimizer::ClearSquares() {
  const OriginScope here("grad_norm");
  squares_ = Tensor::Full({std::ssize(parameters_)}, DType::kF64, 0, MemoryClass::kWorkspace);
}

void ZeroOptimizer::BeginStep(double lr) {
  if (!options_.in_backward) return;
  lr_ = lr;
  ++step_;
  ClearSquares();
}

void ZeroOptimizer::Step(double lr, double gradient_scale) {
  if (!options_.in_backward) ++step_;
  // What the next forward uses first comes first.
  for (size_t b = buckets_.size(); b-- > 0 && !options_.in_backward;) {
    if (!buckets_[b].trainable) continue;
    if (file_ != nullptr && b > 0) file_->Prefetch(States(buckets_[b - 1]));
    Update(buckets_[b], lr, gradient_scale);
  }
  if (file_ != nullptr) file_->Settle();
}

void ZeroOptimizer::Update(Bucket& bucket, double lr, double gradient_scale) {
  std::vector<View> states;
  for (const Slice& s : bucket.slices) {
    states.clear();
    for (const Tensor& state : bucket.states) states.push_back(Flat(state, s.at, s.count));
    const View master = bucket.master.defined() ? Flat(bucket.master, s.at, s.count) : View();
    const UpdateRule::Shard shard = {Value(bucket, s), master, states, Gradient(bucket, s),
                                     bucket.parameters[s.parameter]->decays()};
    if (host_ == nullptr) {
      rule_->Apply(CurrentStream(), shard, step_, lr, gradient_scale);
    } else {
      UpdateOnHost(shard, lr, gradient_scale);
    }
  }
  if (file_ != nullptr) file_->Retire(States(bucket));
  DropGradients(bucket);
  SendForValues(bucket);
}

void ZeroOptimizer::UpdateOnHost(const UpdateRule::Shard& shard, double lr, double gradient_scale) {
  const Tensor gradient = Fetch(*host_, shard.gradient);
  // A rule that has a whole master only writes the parameter.
  const bool written = shard.master && !options_.split_master;
  const Tensor value = written ? OnHost(*host_, shard.parameter) : Fetch(*host_, shard.parameter);
  UpdateRule::Shard host = shard;
  host.parameter = value.view();
  host.gradient = gradient.view();
  rule_->Apply(host_->stream(), host, step_, lr, gradient_scale);
  if constexpr (kHaveCuda)
    cuda::CopyToDevice(CurrentStream().handle, shard.parameter.data, host.parameter.data,
                       host.parameter.bytes());
}

void ZeroOptimizer::DropGradients(Bucket& bucket) {
  bucket.gradient = Tensor();
  for (Parameter* p : bucket.parameters) p->leaf().grad = Tensor();
}

void ZeroOptimizer::DropGradients() {
  for (Bucket& bucket : buckets_) DropGradients(bucket);
}

void ZeroOptimizer::TakeValues() {
  for (const Bucket& bucket : buckets_)
    if (bucket.master.defined()) SetMaster(bucket);
  ShareValues();
}

}  // namespace shoal
