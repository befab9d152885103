#include "memory/offload_activations.h"

#include <vector>

namespace shoal {
namespace {

constexpr size_t kLeastBytes = 16384;

struct Stored {
  Tensor away;
  size_t number = 0;  // in the order of keeping
};

struct State {
  std::shared_ptr<ExecutionContext> where;
  std::shared_ptr<MappedFile> file;  // `where` is its; null: memory
  std::vector<std::weak_ptr<Stored>> order;

  std::shared_ptr<Stored> Store(const Tensor& t) {
    while (!order.empty() && order.back().expired()) order.pop_back();
    auto stored = std::make_shared<Stored>();
    {
      const ContextScope scope(*where);
      stored->away = Tensor::Empty(t.shape(), t.dtype());
    }
    stored->away.CopyFrom(t.contiguous() ? t : t.Clone());
    stored->away.set_placement(t.placement());
    stored->number = order.size();
    order.push_back(stored);
    const View view = stored->away.view();
    if (file != nullptr) file->Retire(std::span(&view, 1));
    return stored;
  }

  Tensor Load(const Stored& stored) {
    const Tensor t = Tensor::Empty(stored.away.shape(), stored.away.dtype());
    t.CopyFrom(stored.away);
    t.set_placement(stored.away.placement());
    if (file == nullptr) return t;
    // Backward asks next for what was kept before.
    for (size_t i = stored.number; i-- > 0;) {
      const std::shared_ptr<Stored> before = order[i].lock();
      if (before == nullptr) continue;
      const View view = before->away.view();
      file->Prefetch(std::span(&view, 1));
      break;
    }
    return t;
  }
};

SavedTensorHooks Offload(std::shared_ptr<ExecutionContext> where,
                         std::shared_ptr<MappedFile> file) {
  const auto state = std::make_shared<State>();
  state->where = std::move(where);
  state->file = std::move(file);
  SavedTensorHooks hooks;
  hooks.pack = [state](const Tensor& t) -> std::any {
    if (t.bytes() < kLeastBytes) return t;
    return state->Store(t);
  };
  hooks.unpack = [state](const std::any& packed) {
    if (const auto* small = std::any_cast<Tensor>(&packed)) return *small;
    return state->Load(*std::any_cast<const std::shared_ptr<Stored>&>(packed));
  };
  return PackOnce(std::move(hooks));
}

}  // namespace

SavedTensorHooks OffloadActivations(std::shared_ptr<MappedFile> file) {
  const std::shared_ptr<ExecutionContext> where(file, &file->context());
  return Offload(where, std::move(file));
}

SavedTensorHooks OffloadActivationsToHost() {
  return Offload(std::make_shared<ExecutionContext>(Device{}), nullptr);
}

}  // namespace shoal
