#include "memory/recompute.h"

#include "core/keep.h"

namespace shoal {
namespace {

Tensor Recomputed(const Tensor& in, const std::function<Tensor(const Tensor&)>& forward,
                  const std::function<void()>& restore) {
  if (!GradEnabled()) return forward(in);
  auto kept = std::make_shared<KeptResults>();
  Tensor out;
  {
    const NoGrad no_grad;
    const KeepScope scope(kept.get(), false);
    out = forward(in.Detached());
  }
  // Parameters want gradients even where the input does not: this makes the node.
  const Tensor anchor = Tensor::Empty({0}, in.dtype());
  const auto leaf = std::make_shared<Leaf>(anchor.shape(), anchor.dtype());
  leaf->weight = false;
  anchor.set_node(leaf);
  RecordOptions options;
  options.placement = out.placement();
  const bool wants = in.node() != nullptr;
  return Record(
      "recompute", out.Detached(), {in, anchor}, {in.Detached()},
      [kept, forward, restore, wants](GradContext& context) {
        Tensor x = context.Saved(0);
        const auto input = std::make_shared<Leaf>(x.shape(), x.dtype());
        input->weight = false;
        input->memory_class = MemoryClass::kActivations;
        if (wants) {
          x = x.Detached();
          x.set_node(input);
        }
        Tensor again;
        {
          const EnableGrad enable;
          const KeepScope scope(kept.get(), true);
          const OriginScope again_here(Pass::kRecompute);
          if (restore) restore();
          again = forward(std::exchange(x, {}));
        }
        const Tensor gradient = context.TakeGrad();
        Backward(std::exchange(again, {}), gradient, context.options());
        if (wants && input->grad.defined()) context.Give(0, std::exchange(input->grad, {}));
      },
      options);
}

}  // namespace

void ApplyRecompute(Module& module, std::function<std::function<void()>()> snapshot) {
  module.hooks().around = [snapshot = std::move(snapshot)](
                              const Tensor& in,
                              const std::function<Tensor(const Tensor&)>& forward) {
    return Recomputed(in, forward, snapshot ? snapshot() : nullptr);
  };
}

void ApplySelectiveRecompute(Module& module) {
  module.hooks().around = [](const Tensor& in,
                             const std::function<Tensor(const Tensor&)>& forward) {
    const RematerializeScope scope;
    return forward(in);
  };
}

}  // namespace shoal
