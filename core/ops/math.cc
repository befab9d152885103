#include "core/ops.h"
#include "core/ops/common.h"
#include "kernels/copy.h"
#include "kernels/elementwise.h"
#include "kernels/reduce.h"

namespace shoal::ops {

Tensor Add(const Tensor& a, const Tensor& b) {
  const OriginScope here("add");
  CheckAlike("add", a, b);
  Tensor out = Tensor::Empty(a.shape(), a.dtype());
  kernels::Add(CurrentStream(), out.view(), a.view(), b.view(), 1, 1);
  return Record("add", out, {a, b}, {},
                [](GradContext& context) {
                  context.Give(0, context.grad());
                  context.Give(1, context.TakeGrad());
                },
                {.linear = true});
}

Tensor Multiply(const Tensor& a, const Tensor& b) {
  const OriginScope here("multiply");
  CheckAlike("multiply", a, b);
  Tensor out = Tensor::Empty(a.shape(), a.dtype());
  kernels::Multiply(CurrentStream(), out.view(), a.view(), b.view());
  return Record("multiply", out, {a, b}, {a, b}, [](GradContext& context) {
    for (int i = 0; i < 2; ++i) {
      const Tensor other = context.Saved(1 - i);
      if (!context.Needs(i)) continue;
      Tensor gradient = Tensor::Empty(other.shape(), other.dtype());
      kernels::Multiply(CurrentStream(), gradient.view(), context.grad().view(), other.view());
      context.Give(i, std::move(gradient));
    }
  });
}

Tensor Scale(const Tensor& x, double alpha) {
  const OriginScope here("scale");
  Tensor out = Tensor::Empty(x.shape(), x.dtype());
  kernels::Scale(CurrentStream(), out.view(), x.view(), alpha);
  return Record("scale", out, {x}, {},
                [alpha](GradContext& context) {
                  Tensor gradient = Overwritable(context.TakeGrad());
                  kernels::Scale(CurrentStream(), gradient.view(), gradient.view(), alpha);
                  context.Give(0, std::move(gradient));
                },
                {.linear = true});
}

Tensor Gelu(const Tensor& x) {
  const OriginScope here("gelu");
  RecordOptions options;
  options.recompute = [](const std::vector<Tensor>& in) {
    Tensor out = Tensor::Empty(in[0].shape(), in[0].dtype());
    kernels::Gelu(CurrentStream(), out.view(), in[0].view());
    return out;
  };
  return Record(
      "gelu", options.recompute({x}), {x}, {x},
      [](GradContext& context) {
        Tensor gradient = Overwritable(context.TakeGrad());
        kernels::GeluBackward(CurrentStream(), gradient.view(), gradient.view(),
                              context.Saved(0).view());
        context.Give(0, std::move(gradient));
      },
      options);
}

Tensor Silu(const Tensor& x) {
  const OriginScope here("silu");
  RecordOptions options;
  options.recompute = [](const std::vector<Tensor>& in) {
    Tensor out = Tensor::Empty(in[0].shape(), in[0].dtype());
    kernels::Silu(CurrentStream(), out.view(), in[0].view());
    return out;
  };
  return Record(
      "silu", options.recompute({x}), {x}, {x},
      [](GradContext& context) {
        Tensor gradient = Overwritable(context.TakeGrad());
        kernels::SiluBackward(CurrentStream(), gradient.view(), gradient.view(),
                              context.Saved(0).view());
        context.Give(0, std::move(gradient));
      },
      options);
}

Tensor SwiGlu(const Tensor& gate, const Tensor& up) {
  const OriginScope here("swiglu");
  CheckAlike("swiglu", gate, up);
  RecordOptions options;
  options.recompute = [](const std::vector<Tensor>& in) {
    Tensor out = Tensor::Empty(in[0].shape(), in[0].dtype());
    kernels::SwiGlu(CurrentStream(), out.view(), in[0].view(), in[1].view());
    return out;
  };
  return Record(
      "swiglu", options.recompute({gate, up}), {gate, up}, {gate, up},
      [](GradContext& context) {
        // The gradients take the places of what was kept, if nobody else reads it.
        const Tensor gate = context.Saved(0), up = context.Saved(1);
        const Tensor dgate = gate.exclusive() ? gate : Tensor::Empty(gate.shape(), gate.dtype());
        const Tensor dup = up.exclusive() ? up : Tensor::Empty(up.shape(), up.dtype());
        kernels::SwiGluBackward(CurrentStream(), dgate.view(), dup.view(), context.grad().view(),
                                gate.view(), up.view());
        context.Give(0, dgate);
        context.Give(1, dup);
      },
      options);
}

Tensor Cast(const Tensor& x, DType dtype) {
  const OriginScope here("cast");
  if (x.dtype() == dtype) return x;
  return Record(
      "cast", x.To(dtype), {x}, {},
      [from = x.dtype()](GradContext& context) { context.Give(0, context.grad().To(from)); },
      {.linear = true});
}

Tensor Reshape(const Tensor& x, const Dims& shape) {
  const Tensor out = x.Reshaped(shape);
  const Placement placement = ReshapedPlacement("reshape", x, out.shape());
  return Record("reshape", out, {x}, {},
                [from = x.shape()](GradContext& context) {
                  const Tensor gradient = context.TakeGrad();
                  context.Give(
                      0, (gradient.contiguous() ? gradient : gradient.Clone()).Reshaped(from));
                },
                {.placement = placement});
}

Tensor Narrow(const Tensor& x, int dim, int64_t begin, int64_t count) {
  return Record("narrow", x.Narrowed(dim, begin, count), {x}, {},
                [=](GradContext& context) {
                  const auto [gradient, accumulate] = context.Sink(0);
                  if (!accumulate) gradient.Fill(0);
                  const View part = gradient.Narrowed(dim, begin, count).view();
                  // Add works on contiguous arrays: the part is copied out and back.
                  const Tensor sum = gradient.Narrowed(dim, begin, count).Clone();
                  const Tensor dy =
                      context.grad().contiguous() ? context.grad() : context.grad().Clone();
                  kernels::Add(CurrentStream(), sum.view(), sum.view(), dy.view(), 1, 1);
                  kernels::Copy(CurrentStream(), part, sum.view());
                },
                {.linear = true});
}

Tensor Sum(const Tensor& x) {
  const OriginScope here("sum");
  Tensor out = Tensor::Empty({1}, DType::kF64);
  kernels::Sum(CurrentStream(), out.view(), x.view());
  const Placement placement = PlacePerAxis(std::span(&x, 1), [&](MeshAxis axis) -> AxisPlacement {
    const AxisPlacement p = x.placement()[axis];
    return p.kind == AxisPlacement::kSharded ? AxisPlacement{AxisPlacement::kPartial} : p;
  });
  return Record("sum", out, {x}, {},
                [shape = x.shape(), dtype = x.dtype()](GradContext& context) {
                  context.Give(0, Tensor::Full(shape, dtype, context.grad().Item()));
                },
                {.placement = placement});
}

}  // namespace shoal::ops
