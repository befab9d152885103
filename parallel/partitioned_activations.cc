#include "parallel/partitioned_activations.h"

namespace shoal {
namespace {

struct Kept {
  Tensor part;  // [n] of the flattened whole, or the whole itself
  Dims shape;   // of the whole; rank 0: `part` is it
};

// Linears that read one value keep it each: they share the part, and its return. The last of both
// is remembered, until the pass turns.
struct Last {
  Tensor whole, part;
};

}  // namespace

SavedTensorHooks PartitionActivations(Communicator& group) {
  const auto last = std::make_shared<Last>();
  SavedTensorHooks hooks;
  hooks.pack = [&group, last](const Tensor& t) -> std::any {
    const bool alike = group.axis() && t.placement()[*group.axis()].SameOnAllRanks();
    if (group.size() == 1 || !alike || !t.contiguous()) return Kept{t, {}};
    const bool again = last->whole.defined() && &last->whole.storage() == &t.storage() &&
                       last->whole.view().data == t.view().data && last->whole.shape() == t.shape();
    if (!again) {
      const int64_t begin = ShardBegin(t.numel(), group.rank(), group.size());
      const int64_t end = ShardBegin(t.numel(), group.rank() + 1, group.size());
      *last = {t, t.Reshaped({-1}).Narrowed(0, begin, end - begin).Clone()};
    }
    return Kept{last->part, t.shape()};
  };
  hooks.unpack = [&group, last](const std::any& packed) {
    const auto& kept = std::any_cast<const Kept&>(packed);
    if (kept.shape.rank() == 0) return kept.part;
    if (!last->part.defined() || !last->part.is(kept.part) || !last->whole.defined()) {
      *last = {};
      const int64_t n = kept.shape.numel();
      const Tensor whole = Tensor::Empty({n}, kept.part.dtype());
      whole.Narrowed(0, ShardBegin(n, group.rank(), group.size()), kept.part.numel())
          .CopyFrom(kept.part);
      const View view = whole.view();
      group.AllGather(std::span(&view, 1));
      *last = {whole.Reshaped(kept.shape), kept.part};
      last->whole.set_placement(kept.part.placement());
    }
    return last->whole.Detached();
  };
  return hooks;
}

}  // namespace shoal
