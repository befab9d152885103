#include "core/ops.h"
#include "core/ops/common.h"
#include "kernels/matmul.h"
#include "kernels/reduce.h"

namespace shoal::ops {
namespace {

// Columns of the product where the weight's rows are split; parts of a sum where its columns are.
Placement LinearPlacement(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const std::array operands = {x, weight, bias};
  return PlacePerAxis(operands, [&](MeshAxis axis) -> AxisPlacement {
    const auto on = [&](const Tensor& t) { return t.placement()[axis]; };
    const auto last = AxisPlacement::Sharded(x.rank() - 1);
    if (on(weight) == AxisPlacement::Sharded(0)) {
      const AxisPlacement in = UniformPlacement("linear", axis, std::array{x, weight});
      if (on(x).kind == AxisPlacement::kSharded)
        FailPlacement("linear", axis, x, 0, "meets a weight of which each rank has some rows");
      if (bias.defined() && on(bias) != AxisPlacement::Sharded(0))
        FailPlacement("linear", axis, bias, 2, "is not split as the weight's rows are");
      return in.kind == AxisPlacement::kVarying ? in : last;
    }
    if (on(weight) == AxisPlacement::Sharded(1)) {
      if (on(x) != last && on(x).kind != AxisPlacement::kVarying)
        FailPlacement("linear", axis, x, 0, "is not split as the weight's columns are");
      if (bias.defined() && on(bias).kind != AxisPlacement::kPartial)
        FailPlacement("linear", axis, bias, 2,
                      "is added on every rank to parts of a sum, which would count it on each");
      return {AxisPlacement::kPartial};
    }
    if (on(x) == last)
      FailPlacement("linear", axis, x, 0, "has a part of each row, and the weight is whole");
    return UniformPlacement("linear", axis, operands);
  });
}

}  // namespace

Tensor Linear(const Tensor& x, const Tensor& weight, const Tensor& bias, bool wide) {
  const OriginScope here("linear");
  SHOAL_CHECK(weight.rank() == 2 && x.dim(-1) == weight.dim(1), "linear",
              "input {} does not fit weight {}", x.shape().ToString(), weight.shape().ToString());
  Dims shape = x.shape();
  shape[-1] = weight.dim(0);
  Tensor out = Tensor::Empty(shape, wide ? AccumulatorDType(x.dtype()) : x.dtype());
  kernels::Matmul(CurrentStream(), Rows(out).view(), Rows(x).view(), weight.view().Transposed(),
                  bias.view(), 0);
  return Record("linear", out, {x, weight, bias}, {x, weight},
                [](GradContext& context) {
                  const Tensor x = Rows(context.Saved(0)), weight = context.Saved(1),
                               dy = Rows(context.grad());
                  if (context.Needs(0)) {
                    const auto [dx, accumulate] = context.Sink(0);
                    kernels::Matmul(CurrentStream(), Rows(dx).view(), dy.view(), weight.view(), {},
                                    accumulate);
                  }
                  if (context.Needs(1)) {
                    const auto [dweight, accumulate] = context.Sink(1);
                    kernels::Matmul(CurrentStream(), dweight.view(), dy.view().Transposed(),
                                    x.view(), {}, accumulate);
                  }
                  if (context.Needs(2)) {
                    const auto [dbias, accumulate] = context.Sink(2);
                    kernels::SumRows(CurrentStream(), dbias.view(), dy.view(), accumulate);
                  }
                },
                {.placement = LinearPlacement(x, weight, bias)});
}

Tensor Matmul(const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b) {
  const OriginScope here("matmul");
  const View va = transpose_a ? a.view().Transposed() : a.view();
  const View vb = transpose_b ? b.view().Transposed() : b.view();
  SHOAL_CHECK(a.rank() == b.rank() && (a.rank() == 2 || a.rank() == 3) && va.dim(-1) == vb.dim(-2),
              "matmul", "{} and {} do not multiply", va.shape.ToString(), vb.shape.ToString());
  Dims shape = va.shape;
  shape[-1] = vb.dim(-1);
  Tensor out = Tensor::Empty(shape, a.dtype());
  kernels::Matmul(CurrentStream(), out.view(), va, vb, {}, 0);
  return Record("matmul", out, {a, b}, {a, b}, [=](GradContext& context) {
    const Tensor a = context.Saved(0), b = context.Saved(1);
    const View va = transpose_a ? a.view().Transposed() : a.view();
    const View vb = transpose_b ? b.view().Transposed() : b.view();
    const View dy = context.grad().view();
    // d is row-major, so the gradient of a transposed argument is computed transposed.
    if (context.Needs(0)) {
      const auto [da, accumulate] = context.Sink(0);
      if (transpose_a) {
        kernels::Matmul(CurrentStream(), da.view(), vb, dy.Transposed(), {}, accumulate);
      } else {
        kernels::Matmul(CurrentStream(), da.view(), dy, vb.Transposed(), {}, accumulate);
      }
    }
    if (context.Needs(1)) {
      const auto [db, accumulate] = context.Sink(1);
      if (transpose_b) {
        kernels::Matmul(CurrentStream(), db.view(), dy.Transposed(), va, {}, accumulate);
      } else {
        kernels::Matmul(CurrentStream(), db.view(), va.Transposed(), dy, {}, accumulate);
      }
    }
  });
}

}  // namespace shoal::ops
