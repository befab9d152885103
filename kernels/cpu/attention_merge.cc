// What joins tiles of attention: the merge of two softmaxes' results, and the row sums that their
// backward needs.
#include <cmath>
#include <limits>

#include "kernels/attention.h"
#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_merge.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

template <class T>
T* RowAt(const View& x, int64_t b, int64_t t, int64_t n) {
  return x.as<T>() + b * x.strides[0] + t * x.strides[1] + n * x.strides[2];
}
// Of lse or delta [B, N, T].
template <class A>
A* StatisticAt(const View& x, int64_t b, int64_t t, int64_t n) {
  return x.as<A>() + b * x.strides[0] + n * x.strides[1] + t;
}

// f(b, t, n) for every row of x [B, T, N, H].
template <class F>
void ForRows(const View& x, F f) {
  const int64_t tokens = x.dim(1), heads = x.dim(2);
  ParallelFor(x.dim(0) * tokens, x.numel(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t n = 0; n < heads; ++n) f(i / tokens, i % tokens, n);
  });
}

template <class A, class T>
void MergeRow(A* out, A* lse, const T* part, A lse_part, int64_t h) {
  constexpr A kNothing = -std::numeric_limits<A>::infinity();
  if (lse_part == kNothing) return;
  if (*lse == kNothing) {
    Map<A>(
        h, [](auto, auto v) HWY_ATTR { return v; }, out, part);
    *lse = lse_part;
    return;
  }
  const A top = std::max(*lse, lse_part);
  const A weight = std::exp(*lse - top), weight_part = std::exp(lse_part - top);
  const A sum = weight + weight_part, mine = weight / sum, theirs = weight_part / sum;
  Map<A>(
      h,
      [mine, theirs](auto d, auto x, auto y)
          HWY_ATTR { return hn::MulAdd(x, hn::Set(d, mine), hn::Mul(y, hn::Set(d, theirs))); },
      out, static_cast<const A*>(out), part);
  *lse = top + std::log(sum);
}

void MergeImpl(const View& out, const View& lse, const View& part, const View& lse_part) {
  VisitFloat(part.dtype, "MergeAttention", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    ForRows(out, [&](int64_t b, int64_t t, int64_t n) {
      MergeRow(RowAt<A>(out, b, t, n), StatisticAt<A>(lse, b, t, n), RowAt<const T>(part, b, t, n),
               *StatisticAt<const A>(lse_part, b, t, n), out.dim(3));
    });
  });
}

void DeltaImpl(const View& delta, const View& dout, const View& out) {
  VisitFloat(out.dtype, "AttentionDelta", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    ForRows(out, [&](int64_t b, int64_t t, int64_t n) {
      const hn::ScalableTag<A> d;
      const T *x = RowAt<const T>(dout, b, t, n), *y = RowAt<const T>(out, b, t, n);
      *StatisticAt<A>(delta, b, t, n) = SumOver(d, out.dim(3), [&](int64_t i, auto part) HWY_ATTR {
        return hn::Mul(Load(d, x + i, part), Load(d, y + i, part));
      });
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(MergeImpl);
HWY_EXPORT(DeltaImpl);

// [.., H] of this shape with unit steps in the last dimension.
void CheckRows(const char* op, const char* name, const View& x, const Dims& shape, DType dtype) {
  CheckShape(op, name, x, shape);
  CheckDType(op, name, x, dtype);
  CheckPresent(op, name, x);
  SHOAL_CHECK(x.strides[-1] == 1 || x.dim(x.rank() - 1) <= 1, op,
              "{}'s last dimension has stride {}; it must be contiguous", name, x.strides[-1]);
}

}  // namespace

void MergeAttention(const Stream&, const View& out, const View& lse, const View& out_part,
                    const View& lse_part) {
  const char* op = "MergeAttention";
  CheckRank(op, "out", out, 4);
  const DType wide = AccumulatorDType(out_part.dtype);
  const Dims rows{out.dim(0), out.dim(2), out.dim(1)};
  CheckRows(op, "out", out, out.shape, wide);
  CheckRows(op, "out_part", out_part, out.shape, out_part.dtype);
  CheckRows(op, "lse", lse, rows, wide);
  CheckRows(op, "lse_part", lse_part, rows, wide);
  HWY_DYNAMIC_DISPATCH(MergeImpl)(out, lse, out_part, lse_part);
}

void AttentionDelta(const Stream&, const View& delta, const View& dout, const View& out) {
  const char* op = "AttentionDelta";
  CheckRank(op, "out", out, 4);
  CheckRows(op, "out", out, out.shape, out.dtype);
  CheckRows(op, "dout", dout, out.shape, out.dtype);
  CheckArray(op, "delta", delta, {out.dim(0), out.dim(2), out.dim(1)}, AccumulatorDType(out.dtype));
  HWY_DYNAMIC_DISPATCH(DeltaImpl)(delta, dout, out);
}

}  // namespace shoal::kernels::cpu
#endif
