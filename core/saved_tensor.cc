#include "core/saved_tensor.h"

#include "core/autograd.h"

namespace shoal {
namespace {
thread_local std::shared_ptr<const SavedTensorHooks> current_hooks;
thread_local bool rematerialize = false;
}  // namespace

SavedTensorScope::SavedTensorScope(SavedTensorHooks hooks) : previous_(std::move(current_hooks)) {
  current_hooks = std::make_shared<const SavedTensorHooks>(std::move(hooks));
}
SavedTensorScope::~SavedTensorScope() { current_hooks = std::move(previous_); }

SavedTensorHooks PackOnce(SavedTensorHooks hooks) {
  struct Last {
    Tensor flat;  // its elements
    std::shared_ptr<std::any> packed;
  };
  struct Kept {
    std::shared_ptr<std::any> packed;
    Dims shape;
    Placement placement;
  };
  const auto last = std::make_shared<Last>();
  SavedTensorHooks once;
  once.rounds = hooks.rounds;
  once.pack = [last, pack = std::move(hooks.pack)](const Tensor& t) -> std::any {
    const Tensor flat = t.contiguous() ? t.Reshaped({t.numel()}) : t;
    if (!last->flat.SameElements(flat)) *last = {flat, std::make_shared<std::any>(pack(t))};
    return Kept{last->packed, t.shape(), t.placement()};
  };
  once.unpack = [last, unpack = std::move(hooks.unpack)](const std::any& packed) {
    *last = {};
    const auto& kept = std::any_cast<const Kept&>(packed);
    Tensor t = unpack(*kept.packed);
    if (t.shape() != kept.shape) t = t.Reshaped(kept.shape);
    t.set_placement(kept.placement);
    return t;
  };
  return once;
}

RematerializeScope::RematerializeScope() : previous_(rematerialize) { rematerialize = true; }
RematerializeScope::~RematerializeScope() { rematerialize = previous_; }
bool RematerializeScope::active() { return rematerialize; }

SavedTensor::SavedTensor(const Tensor& t, bool exact) {
  if (!t.defined()) return;
  if (rematerialize) rematerialized_ = RematerializedBy(t.node().get());
  if (rematerialized_ != nullptr) {
    placement_ = t.placement();
    return;
  }
  const bool parameter = t.node() != nullptr && t.node()->is_weight();
  const bool hooked = current_hooks != nullptr && !(exact && current_hooks->rounds);
  if (hooked && !parameter && IsFloat(t.dtype())) {
    hooks_ = current_hooks;
    packed_ = hooks_->pack(t.Detached());
  } else {
    tensor_ = t.Detached();
  }
}

Tensor SavedTensor::Take() {
  if (rematerialized_ != nullptr) {
    const std::shared_ptr<Rematerialized> shared = std::move(rematerialized_);
    if (!shared->value.defined()) {
      std::vector<Tensor> operands;
      for (const SavedTensor& operand : shared->operands)
        operands.push_back(SavedTensor(operand).Take());
      const OriginScope here(shared->origin);
      shared->value = shared->compute(operands);
    }
    const Tensor t = shared->value.Detached();
    t.set_placement(placement_);
    if (shared.use_count() == 1) shared->value = Tensor();
    return t;
  }
  if (!packed_.has_value()) return std::move(tensor_);
  Tensor t = hooks_->unpack(packed_);
  packed_.reset();
  return t;
}

}  // namespace shoal
