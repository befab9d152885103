#include "parallel/partitioned_activations.h"

namespace shoal {
namespace {

struct Kept {
  std::shared_ptr<std::any> part;  // [n] of the flattened whole, as `inner` keeps it, or the whole
  Dims shape;                      // of the whole; rank 0: `part` is it
};

// Linears that read one value keep it each: they share the part, and its return. The last of both
// is remembered, until the pass turns.
struct Last {
  Tensor whole;
  std::shared_ptr<std::any> part;
};

}  // namespace

SavedTensorHooks PartitionActivations(Communicator& group, SavedTensorHooks inner) {
  if (!inner.pack) {
    inner.pack = [](const Tensor& t) -> std::any { return t; };
    inner.unpack = [](const std::any& packed) { return std::any_cast<const Tensor&>(packed); };
  }
  const auto last = std::make_shared<Last>();
  SavedTensorHooks hooks;
  hooks.rounds = inner.rounds;
  hooks.pack = [&group, last, inner](const Tensor& t) -> std::any {
    const bool alike = group.axis() && t.placement()[*group.axis()].SameOnAllRanks();
    if (group.size() == 1 || !alike || !t.contiguous())
      return Kept{std::make_shared<std::any>(inner.pack(t)), {}};
    if (!last->whole.SameElements(t)) {
      const int64_t begin = ShardBegin(t.numel(), group.rank(), group.size());
      const int64_t end = ShardBegin(t.numel(), group.rank() + 1, group.size());
      const Tensor part = t.Reshaped({-1}).Narrowed(0, begin, end - begin).Clone();
      *last = {t, std::make_shared<std::any>(inner.pack(part))};
    }
    return Kept{last->part, t.shape()};
  };
  hooks.unpack = [&group, last, inner](const std::any& packed) {
    const auto& kept = std::any_cast<const Kept&>(packed);
    if (kept.shape.rank() == 0) return inner.unpack(*kept.part);
    if (last->part != kept.part || !last->whole.defined()) {
      *last = {};
      const int64_t n = kept.shape.numel();
      const Tensor part = inner.unpack(*kept.part);
      const Tensor whole = Tensor::Empty({n}, part.dtype());
      whole.Narrowed(0, ShardBegin(n, group.rank(), group.size()), part.numel()).CopyFrom(part);
      const View view = whole.view();
      group.AllGather(std::span(&view, 1));
      *last = {whole.Reshaped(kept.shape), kept.part};
      last->whole.set_placement(part.placement());
    }
    return last->whole.Detached();
  };
  return hooks;
}

}  // namespace shoal
