#include "kernels/norm.h"

#include "core/ops.h"
#include "core/ops/common.h"
#include "kernels/rope.h"
#include "kernels/softmax.h"

namespace shoal::ops {
namespace {

// Where a gradient goes that may not be wanted: the kernels compute both in one pass.
GradContext::Target SinkOrScrap(GradContext& context, int i, const Tensor& like) {
  if (context.Needs(i)) return context.Sink(i);
  return {Tensor::Empty(like.shape(), like.dtype(), MemoryClass::kWorkspace), false};
}

Tensor Statistic(const Tensor& x, MemoryClass memory_class = MemoryClass::kActivations) {
  return Tensor::Empty({Rows(x).dim(0)}, AccumulatorDType(x.dtype()), memory_class);
}

Tensor RmsNormTo(const Tensor& rstd, const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = Tensor::Empty(x.shape(), x.dtype());
  kernels::RmsNorm(CurrentStream(), Rows(out).view(), rstd.view(), Rows(x).view(), weight.view(),
                   eps);
  return out;
}

Tensor LayerNormTo(const Tensor& mean, const Tensor& rstd, const Tensor& x, const Tensor& weight,
                   const Tensor& bias, double eps) {
  Tensor out = Tensor::Empty(x.shape(), x.dtype());
  kernels::LayerNorm(CurrentStream(), Rows(out).view(), mean.view(), rstd.view(), Rows(x).view(),
                     weight.view(), bias.view(), eps);
  return out;
}

}  // namespace

Tensor RmsNorm(const Tensor& x, const Tensor& weight, double eps) {
  const OriginScope here("rms_norm");
  CheckWholeRows("rms_norm", x);
  const Tensor rstd = Statistic(x);
  RecordOptions options;
  options.split = false;
  options.exact = {2};  // rstd
  options.recompute = [eps](const std::vector<Tensor>& in) {
    return RmsNormTo(Statistic(in[0], MemoryClass::kWorkspace), in[0], in[1], eps);
  };
  const Tensor out = RmsNormTo(rstd, x, weight, eps);
  return Record(
      "rms_norm", out, {x, weight}, {x, weight, rstd},
      [](GradContext& context) {
        const Tensor x = context.Saved(0), weight = context.Saved(1), rstd = context.Saved(2);
        const auto dx = SinkOrScrap(context, 0, x);
        const auto dweight = SinkOrScrap(context, 1, weight);
        kernels::RmsNormBackward(CurrentStream(), Rows(dx.tensor).view(), dx.accumulate,
                                 dweight.tensor.view(), dweight.accumulate,
                                 Rows(context.grad()).view(), Rows(x).view(), weight.view(),
                                 rstd.view());
      },
      options);
}

Tensor LayerNorm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const OriginScope here("layer_norm");
  CheckWholeRows("layer_norm", x);
  const Tensor mean = Statistic(x), rstd = Statistic(x);
  RecordOptions options;
  options.split = false;
  options.exact = {2, 3};  // mean, rstd
  options.recompute = [eps](const std::vector<Tensor>& in) {
    const auto scrap = [&] { return Statistic(in[0], MemoryClass::kWorkspace); };
    return LayerNormTo(scrap(), scrap(), in[0], in[1], in[2], eps);
  };
  const Tensor out = LayerNormTo(mean, rstd, x, weight, bias, eps);
  return Record(
      "layer_norm", out, {x, weight, bias}, {x, weight, mean, rstd},
      [](GradContext& context) {
        const Tensor x = context.Saved(0), weight = context.Saved(1), mean = context.Saved(2),
                     rstd = context.Saved(3);
        const auto dx = SinkOrScrap(context, 0, x);
        const auto dweight = SinkOrScrap(context, 1, weight);
        const auto dbias = SinkOrScrap(context, 2, weight);
        // The kernel has one flag for both; they differ only where one of the two is
        // frozen.
        const bool accumulate = dweight.accumulate || dbias.accumulate;
        if (accumulate && !dweight.accumulate) dweight.tensor.Fill(0);
        if (accumulate && !dbias.accumulate) dbias.tensor.Fill(0);
        kernels::LayerNormBackward(CurrentStream(), Rows(dx.tensor).view(), dx.accumulate,
                                   dweight.tensor.view(), dbias.tensor.view(), accumulate,
                                   Rows(context.grad()).view(), Rows(x).view(), weight.view(),
                                   mean.view(), rstd.view());
      },
      options);
}

Tensor Softmax(const Tensor& x) {
  const OriginScope here("softmax");
  CheckWholeRows("softmax", x);
  Tensor out = Tensor::Empty(x.shape(), x.dtype());
  kernels::Softmax(CurrentStream(), Rows(out).view(), Rows(x).view());
  return Record("softmax", out, {x}, {out}, [](GradContext& context) {
    const Tensor out = context.Saved(0);
    Tensor gradient = Overwritable(context.TakeGrad());
    kernels::SoftmaxBackward(CurrentStream(), Rows(gradient).view(), Rows(gradient).view(),
                             Rows(out).view());
    context.Give(0, std::move(gradient));
  });
}

Tensor Rope(const Tensor& x, const Tensor& positions, double theta) {
  const OriginScope here("rope");
  CheckWholeRows("rope", x);
  Tensor out = Tensor::Empty(x.shape(), x.dtype());
  kernels::Rope(CurrentStream(), out.view(), x.view(), positions.view(), theta, false);
  return Record("rope", out, {x}, {positions}, [theta](GradContext& context) {
    const Tensor positions = context.Saved(0);
    Tensor gradient = Overwritable(context.TakeGrad());
    kernels::Rope(CurrentStream(), gradient.view(), gradient.view(), positions.view(), theta, true);
    context.Give(0, std::move(gradient));
  });
}

}  // namespace shoal::ops
