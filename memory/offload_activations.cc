#include "memory/offload_activations.h"

#include <vector>

namespace shoal {
namespace {

constexpr size_t kLeastBytes = 16384;

struct Stored {
  Tensor in_file;
  size_t number = 0;  // in the order of keeping
};

struct State {
  std::shared_ptr<MappedFile> file;
  std::vector<std::weak_ptr<Stored>> order;

  std::shared_ptr<Stored> Store(const Tensor& t) {
    while (!order.empty() && order.back().expired()) order.pop_back();
    auto stored = std::make_shared<Stored>();
    {
      const ContextScope in_file(file->context());
      stored->in_file = Tensor::Empty(t.shape(), t.dtype());
    }
    stored->in_file.CopyFrom(t);
    stored->in_file.set_placement(t.placement());
    stored->number = order.size();
    order.push_back(stored);
    const View view = stored->in_file.view();
    file->Retire(std::span(&view, 1));
    return stored;
  }

  Tensor Load(const Stored& stored) {
    const Tensor t = stored.in_file.Clone();
    // Backward asks next for what was kept before.
    for (size_t i = stored.number; i-- > 0;) {
      const std::shared_ptr<Stored> before = order[i].lock();
      if (before == nullptr) continue;
      const View view = before->in_file.view();
      file->Prefetch(std::span(&view, 1));
      break;
    }
    return t;
  }
};

}  // namespace

SavedTensorHooks OffloadActivations(std::shared_ptr<MappedFile> file) {
  const auto state = std::make_shared<State>();
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

}  // namespace shoal
