#include "parallel/data_parallel.h"

namespace shoal {

DataParallel::DataParallel(std::vector<std::shared_ptr<Parameter>> parameters,
                           Communicator& communicator, DataParallelOptions options)
    : parameters_(std::move(parameters)), communicator_(communicator) {
  // Backward reaches the last parameters first. One dtype per bucket.
  int64_t bytes = 0;
  for (auto it = parameters_.rbegin(); it != parameters_.rend(); ++it) {
    Parameter& parameter = **it;
    if (!parameter.requires_grad()) continue;
    const bool fits =
        !buckets_.empty() && bytes < options.bucket_bytes &&
        buckets_.back().parameters[0]->leaf().grad_dtype == parameter.leaf().grad_dtype;
    if (!fits) {
      buckets_.emplace_back();
      bytes = 0;
    }
    const size_t bucket = buckets_.size() - 1;
    buckets_[bucket].parameters.push_back(&parameter);
    ++buckets_[bucket].waiting;
    bytes += parameter.value().numel() * static_cast<int64_t>(SizeOf(parameter.leaf().grad_dtype));
    parameter.leaf().hooks.push_back([this, bucket](GradEvent event) {
      if (event != GradEvent::kFinal) return;
      --buckets_[bucket].waiting;
      ReduceReady();
    });
  }
}

void DataParallel::BroadcastParameters() {
  for (const auto& parameter : parameters_) communicator_.Broadcast(parameter->value().view(), 0);
}

void DataParallel::ReduceReady() {
  while (next_ < buckets_.size() && buckets_[next_].waiting == 0) Reduce(buckets_[next_++]);
}

void DataParallel::Reduce(const Bucket& bucket) {
  std::vector<View> pieces;
  for (Parameter* parameter : bucket.parameters) {
    Leaf& leaf = parameter->leaf();
    if (!leaf.grad.defined())
      leaf.grad = Tensor::Full(parameter->shape(), leaf.grad_dtype, 0, leaf.memory_class);
    pieces.push_back(leaf.grad.view());
  }
  communicator_.AllReduce(pieces);
}

void DataParallel::Finish() {
  while (next_ < buckets_.size()) Reduce(buckets_[next_++]);
  next_ = 0;
  for (Bucket& bucket : buckets_) bucket.waiting = static_cast<int>(bucket.parameters.size());
}

}  // namespace shoal
