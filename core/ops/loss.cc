#include "core/ops.h"
#include "core/ops/common.h"
#include "kernels/elementwise.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/reduce.h"

namespace shoal::ops {
namespace {

// The statistics of a split vocabulary are merged inside. Losses of some of the tokens are a part
// of the sum.
Placement LossPlacement(const Tensor& x, const Tensor& weight, bool merged) {
  const std::array operands = {x, weight};
  return PlacePerAxis(operands, [&](MeshAxis axis) -> AxisPlacement {
    const AxisPlacement p = UniformPlacement("linear_cross_entropy", axis, operands);
    if (weight.placement()[axis] == AxisPlacement::Sharded(0)) {
      if (!merged || x.placement()[axis].kind == AxisPlacement::kSharded)
        FailPlacement("linear_cross_entropy", axis, weight, 1,
                      "has some of the vocabulary's rows, and the softmax is over all");
      return {AxisPlacement::kInvariant};
    }
    if (x.placement()[axis] == AxisPlacement::Sharded(x.rank() - 1))
      FailPlacement("linear_cross_entropy", axis, x, 0, "has a part of each row");
    const bool own = p.kind == AxisPlacement::kSharded || p.kind == AxisPlacement::kVarying;
    return own ? AxisPlacement{AxisPlacement::kPartial} : p;
  });
}

}  // namespace

// The gradients are computed with the loss, while a chunk's logits are at hand, for an upstream
// gradient of 1; backward scales them if it turns out to be another.
Tensor LinearCrossEntropy(const Tensor& x, const Tensor& weight, const Tensor& labels,
                          double normalizer, const kernels::VocabularyShare* share) {
  const OriginScope here("linear_cross_entropy");
  SHOAL_CHECK(x.dim(-1) == weight.dim(1) && labels.numel() * x.dim(-1) == x.numel(),
              "linear_cross_entropy", "x {}, weight {} and labels {} do not fit",
              x.shape().ToString(), weight.shape().ToString(), labels.shape().ToString());
  SHOAL_CHECK(normalizer > 0, "linear_cross_entropy", "normalizer {}", normalizer);
  const Tensor rows = Rows(x);
  Tensor dx, dweight;
  if (WantsGradient({x, weight})) {
    const Node* node = weight.node().get();
    const Leaf* leaf =
        node != nullptr && node->is_leaf() ? static_cast<const Leaf*>(node) : nullptr;
    dx = Tensor::Empty(x.shape(), share ? AccumulatorDType(x.dtype()) : x.dtype());
    const OriginScope of_weight(leaf ? leaf->interned_name : nullptr);
    dweight = Tensor::Empty(weight.shape(), leaf ? leaf->grad_dtype : weight.dtype(),
                            leaf ? leaf->memory_class : MemoryClass::kGradients);
  }
  Tensor loss = Tensor::Empty({1}, DType::kF64);
  {
    const Tensor losses =
        Tensor::Empty({rows.dim(0)}, AccumulatorDType(x.dtype()), MemoryClass::kWorkspace);
    kernels::LinearCrossEntropyOptions options;
    options.gradient_scale = 1 / normalizer;
    options.share = share;
    kernels::LinearCrossEntropy(CurrentStream(), losses.view(),
                                dx.defined() ? Rows(dx).view() : View(), dweight.view(), false,
                                rows.view(), weight.view(), labels.Reshaped({-1}).view(), options);
    kernels::Sum(CurrentStream(), loss.view(), losses.view());
  }
  kernels::Scale(CurrentStream(), loss.view(), loss.view(), 1 / normalizer);
  const Placement placement = LossPlacement(x, weight, share != nullptr);
  if (!dx.defined()) return loss;
  // Not among the tensors that saved-tensor hooks see: these are gradients, not activations.
  return Record("linear_cross_entropy", loss, {x, weight}, {},
                [dx, dweight](GradContext& context) mutable {
                  const double upstream =
                      context.grad().device().type == DeviceType::kMeta ? 1 : context.grad().Item();
                  for (int i = 0; i < 2; ++i) {
                    Tensor& gradient = i == 0 ? dx : dweight;
                    if (!context.Needs(i)) continue;
                    if (upstream != 1)
                      kernels::Scale(CurrentStream(), gradient.view(), gradient.view(), upstream);
                    context.Give(i, std::move(gradient));
                    gradient = Tensor();
                  }
                },
                {.placement = placement});
}

}  // namespace shoal::ops
