#include "core/saved_tensor.h"

#include "core/autograd.h"

namespace shoal {
namespace {
thread_local std::shared_ptr<const SavedTensorHooks> current_hooks;
}  // namespace

SavedTensorScope::SavedTensorScope(SavedTensorHooks hooks) : previous_(std::move(current_hooks)) {
  current_hooks = std::make_shared<const SavedTensorHooks>(std::move(hooks));
}
SavedTensorScope::~SavedTensorScope() { current_hooks = std::move(previous_); }

SavedTensor::SavedTensor(const Tensor& t) {
  if (!t.defined()) return;
  const bool parameter = t.node() != nullptr && t.node()->is_leaf();
  if (current_hooks != nullptr && !parameter && IsFloat(t.dtype())) {
    hooks_ = current_hooks;
    packed_ = hooks_->pack(t.Detached());
  } else {
    tensor_ = t.Detached();
  }
}

Tensor SavedTensor::Take() {
  if (!packed_.has_value()) return std::move(tensor_);
  Tensor t = hooks_->unpack(packed_);
  packed_.reset();
  return t;
}

}  // namespace shoal
