#include "kernels/norm.h"

#include <cmath>

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// RMSNorm is LayerNorm without mean and bias: views that only LayerNorm has are absent there, and
// `mean.data` decides.

template <bool kCentered, class T>
void NormRows(const View& out, const View& mean, const View& rstd, const View& x,
              const View& weight, const View& bias, double eps) {
  using A = Accumulator<T>;
  const int64_t rows = x.dim(0), n = x.dim(1);
  const bool past = WritesPastCaches(out, {&x}, n * sizeof(T));
  ParallelFor(rows, rows * n, [&](int64_t begin, int64_t end) {
    const hn::ScalableTag<A> d;
    const T* w = weight.as<const T>();
    const T* b = bias.as<const T>();
    for (int64_t r = begin; r < end; ++r) {
      const T* in = x.as<const T>() + r * n;
      T* to = out.as<T>() + r * n;
      A center = 0;
      if constexpr (kCentered)
        center = SumOver(d, n, [&](int64_t i, auto part) { return Load(d, in + i, part); }) / n;
      const auto middle = hn::Set(d, center);
      const auto square = [&](int64_t i, auto part) {
        auto v = Load(d, in + i, part);
        if constexpr (kCentered) {
          v = hn::Sub(v, middle);
          if constexpr (std::is_same_v<decltype(part), First>)
            v = hn::IfThenElseZero(hn::FirstN(d, part.n), v);
        }
        return hn::Mul(v, v);
      };
      const A scale =
          A(1) / std::sqrt(SumOver(d, n, square) / static_cast<A>(n) + static_cast<A>(eps));
      const auto factor = hn::Set(d, scale);
      ForVectors(d, n, [&](int64_t i, auto part) {
        auto v = Load(d, in + i, part);
        if constexpr (kCentered) v = hn::Sub(v, middle);
        v = hn::Mul(hn::Mul(v, factor), Load(d, w + i, part));
        if constexpr (kCentered) v = hn::Add(v, Load(d, b + i, part));
        Store(d, v, to + i, part, past);
      });
      rstd.as<A>()[r] = scale;
      if constexpr (kCentered) mean.as<A>()[r] = center;
    }
    if (past) hwy::FlushStream();
  });
}

void NormImpl(const View& out, const View& mean, const View& rstd, const View& x,
              const View& weight, const View& bias, double eps) {
  VisitFloat(x.dtype, "norm", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (mean) {
      NormRows<true, T>(out, mean, rstd, x, weight, bias, eps);
    } else {
      NormRows<false, T>(out, mean, rstd, x, weight, bias, eps);
    }
  });
}

// Gradients of rows [begin, end). With h = (x - mean) rstd and g = dy weight:
//   dx = rstd (g - mean(g) - h mean(g h)), where RMSNorm has no mean(g);
// dw [n] and db [n] are the rows' sums of dy h and dy.
template <bool kCentered, class T, class A>
void NormBackwardRows(int64_t begin, int64_t end, const View& dx, bool accumulate_dx, A* dw, A* db,
                      const View& dy, const View& x, const View& weight, const View& mean,
                      const View& rstd) {
  const hn::ScalableTag<A> d;
  const int64_t n = x.dim(1);
  const T* w = weight.as<const T>();
  std::fill_n(dw, n, A(0));
  if constexpr (kCentered) std::fill_n(db, n, A(0));
  for (int64_t r = begin; r < end; ++r) {
    const T* in = x.as<const T>() + r * n;
    const T* grad = dy.as<const T>() + r * n;
    T* to = dx.as<T>() + r * n;
    const auto scale = hn::Set(d, rstd.as<const A>()[r]);
    const auto middle = hn::Set(d, kCentered ? mean.as<const A>()[r] : A(0));
    const auto normalised = [&](int64_t i, auto part) {
      auto v = Load(d, in + i, part);
      if constexpr (kCentered) v = hn::Sub(v, middle);
      return hn::Mul(v, scale);
    };
    auto sum_g = hn::Zero(d), sum_gh = hn::Zero(d);
    ForVectors(d, n, [&](int64_t i, auto part) {
      const auto y = Load(d, grad + i, part);
      const auto h = normalised(i, part);
      const auto g = hn::Mul(y, Load(d, w + i, part));  // 0 past the end, and so is g h
      if constexpr (kCentered) {
        sum_g = hn::Add(sum_g, g);
        Store(d, hn::Add(Load(d, db + i, part), y), db + i, part);
      }
      sum_gh = hn::MulAdd(g, h, sum_gh);
      Store(d, hn::MulAdd(y, h, Load(d, dw + i, part)), dw + i, part);
    });
    const auto over_n = hn::Set(d, A(1) / static_cast<A>(n));
    const auto mean_g = hn::Mul(hn::SumOfLanes(d, sum_g), over_n);
    const auto mean_gh = hn::Mul(hn::SumOfLanes(d, sum_gh), over_n);
    ForVectors(d, n, [&](int64_t i, auto part) {
      auto v = hn::Mul(Load(d, grad + i, part), Load(d, w + i, part));
      if constexpr (kCentered) v = hn::Sub(v, mean_g);
      v = hn::Mul(hn::NegMulAdd(normalised(i, part), mean_gh, v), scale);
      if (accumulate_dx) v = hn::Add(v, Load(d, to + i, part));
      Store(d, v, to + i, part);
    });
  }
}

void NormBackwardImpl(const View& dx, bool accumulate_dx, const View& dweight, const View& dbias,
                      bool accumulate_dweight, const View& dy, const View& x, const View& weight,
                      const View& mean, const View& rstd, int64_t block, void* scratch) {
  const int64_t rows = x.dim(0), n = x.dim(1), blocks = (rows + block - 1) / block;
  VisitFloat(x.dtype, "norm", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    A* dw = static_cast<A*>(scratch);  // [blocks, n]
    A* db = dw + blocks * n;           // [blocks, n], with mean only
    ParallelBlocks(rows, block, rows * n, [&](int64_t b, int64_t begin, int64_t end) {
      if (mean) {
        NormBackwardRows<true, T, A>(begin, end, dx, accumulate_dx, dw + b * n, db + b * n, dy, x,
                                     weight, mean, rstd);
      } else {
        NormBackwardRows<false, T, A>(begin, end, dx, accumulate_dx, dw + b * n, nullptr, dy, x,
                                      weight, mean, rstd);
      }
    });
    VisitFloat(dweight.dtype, "norm", [&](auto out_tag) {
      using Out = typename decltype(out_tag)::type;
      SumPartials(dweight.as<Out>(), accumulate_dweight, dw, blocks, n);
      if (mean) SumPartials(dbias.as<Out>(), accumulate_dweight, db, blocks, n);
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(NormImpl);
HWY_EXPORT(NormBackwardImpl);

void CheckRows(const char* op, const View& x, const View& weight, const View& rstd) {
  CheckRank(op, "x", x, 2);
  CheckArray(op, "x", x, x.shape, x.dtype);
  SHOAL_CHECK(x.dim(1) > 0, op, "x has shape {}: its rows are empty", x.shape.ToString());
  CheckArray(op, "weight", weight, {x.dim(1)}, x.dtype);
  CheckArray(op, "rstd", rstd, {x.dim(0)}, AccumulatorDType(x.dtype));
}

void NormBackward(const char* op, const Stream& stream, const View& dx, bool accumulate_dx,
                  const View& dweight, const View& dbias, bool accumulate_dweight, const View& dy,
                  const View& x, const View& weight, const View& mean, const View& rstd) {
  CheckRows(op, x, weight, rstd);
  CheckArray(op, "dx", dx, x.shape, x.dtype);
  CheckArray(op, "dy", dy, x.shape, x.dtype);
  CheckArray(op, "dweight", dweight, weight.shape, dweight.dtype);
  const int64_t block = RowsPerBlock(x.dim(0)), blocks = (x.dim(0) + block - 1) / block;
  Scratch partial(stream, (mean ? 2 : 1) * blocks * x.dim(1) * SizeOf(AccumulatorDType(x.dtype)));
  if (stream.counting()) return;
  HWY_DYNAMIC_DISPATCH(NormBackwardImpl)
  (dx, accumulate_dx, dweight, dbias, accumulate_dweight, dy, x, weight, mean, rstd, block,
   partial.as<void>());
}

}  // namespace

void RmsNorm(const Stream&, const View& out, const View& rstd, const View& x, const View& weight,
             double eps) {
  CheckRows("RmsNorm", x, weight, rstd);
  CheckArray("RmsNorm", "out", out, x.shape, x.dtype);
  HWY_DYNAMIC_DISPATCH(NormImpl)(out, {}, rstd, x, weight, {}, eps);
}

void LayerNorm(const Stream&, const View& out, const View& mean, const View& rstd, const View& x,
               const View& weight, const View& bias, double eps) {
  CheckRows("LayerNorm", x, weight, rstd);
  CheckArray("LayerNorm", "out", out, x.shape, x.dtype);
  CheckArray("LayerNorm", "mean", mean, rstd.shape, rstd.dtype);
  CheckArray("LayerNorm", "bias", bias, weight.shape, x.dtype);
  if (x.dim(0) > 0) HWY_DYNAMIC_DISPATCH(NormImpl)(out, mean, rstd, x, weight, bias, eps);
}

void RmsNormBackward(const Stream& stream, const View& dx, bool accumulate_dx, const View& dweight,
                     bool accumulate_dweight, const View& dy, const View& x, const View& weight,
                     const View& rstd) {
  NormBackward("RmsNormBackward", stream, dx, accumulate_dx, dweight, {}, accumulate_dweight, dy, x,
               weight, {}, rstd);
}

void LayerNormBackward(const Stream& stream, const View& dx, bool accumulate_dx,
                       const View& dweight, const View& dbias, bool accumulate_dweight,
                       const View& dy, const View& x, const View& weight, const View& mean,
                       const View& rstd) {
  CheckArray("LayerNormBackward", "mean", mean, rstd.shape, AccumulatorDType(x.dtype));
  CheckArray("LayerNormBackward", "dbias", dbias, weight.shape, dweight.dtype);
  NormBackward("LayerNormBackward", stream, dx, accumulate_dx, dweight, dbias, accumulate_dweight,
               dy, x, weight, mean, rstd);
}

}  // namespace shoal::kernels::cpu
#endif
