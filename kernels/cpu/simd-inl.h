// Vector building blocks, compiled once per instruction set: include after hwy/foreach_target.h and
// use between HWY_BEFORE_NAMESPACE() and HWY_AFTER_NAMESPACE().
//
// Memory types T are double, float and BF16; arithmetic is in Accumulator<T>. The last, incomplete
// vector of a range goes through the same vector code by way of a buffer, so that an element's
// result does not depend on where a range begins or ends.

#if defined(SHOAL_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHOAL_KERNELS_CPU_SIMD_INL_H_
#undef SHOAL_KERNELS_CPU_SIMD_INL_H_
#else
#define SHOAL_KERNELS_CPU_SIMD_INL_H_
#endif

#include <cstring>
#include <type_traits>

#include "core/base/dtype.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/cpu/parallel.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The type to compute in, given all the memory types of an operation.
template <class... T>
using ComputeType = std::conditional_t<(std::is_same_v<T, double> || ...), double, float>;

template <class D>
using LaneOf = hn::TFromD<D>;
template <class D>
using IfFloat = std::enable_if_t<std::is_same_v<LaneOf<D>, float>, int>;
template <class D, class T>
using IfDoubleFrom =
    std::enable_if_t<std::is_same_v<LaneOf<D>, double> && !std::is_same_v<T, double>, int>;

// --- loads and stores that convert -------------------------------------------------------------

template <class D>
HWY_INLINE hn::Vec<D> LoadAs(D d, const LaneOf<D>* p) {
  return hn::LoadU(d, p);
}
template <class D, IfFloat<D> = 0>
HWY_INLINE hn::Vec<D> LoadAs(D d, const BF16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::RebindToUnsigned<D> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}
template <class D, class T, IfDoubleFrom<D, T> = 0>
HWY_INLINE hn::Vec<D> LoadAs(D d, const T* p) {
  return hn::PromoteTo(d, LoadAs(hn::Rebind<float, D>(), p));
}

// The bits of BF16(v), as BF16's constructor rounds, in the lower halves of 32-bit lanes.
template <class D, IfFloat<D> = 0>
HWY_INLINE hn::Vec<hn::RebindToUnsigned<D>> RoundToBF16(D, hn::Vec<D> v) {
  const hn::RebindToUnsigned<D> du;
  const auto u = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1));
  const auto rounded = hn::Add(u, hn::Add(odd, hn::Set(du, 0x7fff)));
  const auto quiet = hn::Or(u, hn::Set(du, 0x400000));
  return hn::ShiftRight<16>(hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), quiet, rounded));
}

template <class D>
HWY_INLINE void StoreAs(D d, hn::Vec<D> v, LaneOf<D>* p) {
  hn::StoreU(v, d, p);
}
template <class D, IfFloat<D> = 0>
HWY_INLINE void StoreAs(D d, hn::Vec<D> v, BF16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::RebindToSigned<D> di;
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, RoundToBF16(d, v))), d16,
             reinterpret_cast<uint16_t*>(p));
}
template <class D, class T, IfDoubleFrom<D, T> = 0>
HWY_INLINE void StoreAs(D, hn::Vec<D> v, T* p) {
  const hn::Rebind<float, D> df;
  StoreAs(df, hn::DemoteTo(df, v), p);
}

// The first n < Lanes(d) elements; the other lanes are 0.
template <class D, class T>
HWY_INLINE hn::Vec<D> LoadFirst(D d, const T* p, int64_t n) {
  HWY_ALIGN T buffer[hn::MaxLanes(d)];
  std::memset(static_cast<void*>(buffer), 0, sizeof(buffer));
  std::memcpy(static_cast<void*>(buffer), p, n * sizeof(T));
  return LoadAs(d, buffer);
}
template <class D, class T>
HWY_INLINE void StoreFirst(D d, hn::Vec<D> v, T* p, int64_t n) {
  HWY_ALIGN T buffer[hn::MaxLanes(d)];
  StoreAs(d, v, buffer);
  std::memcpy(static_cast<void*>(p), buffer, n * sizeof(T));
}

// Which elements of a vector a step of ForVectors covers: all, or the first n.
struct All {};
struct First {
  int64_t n;
};
template <class D, class T>
HWY_INLINE hn::Vec<D> Load(D d, const T* p, All) {
  return LoadAs(d, p);
}
template <class D, class T>
HWY_INLINE hn::Vec<D> Load(D d, const T* p, First part) {
  return LoadFirst(d, p, part.n);
}
template <class D, class T>
HWY_INLINE void Store(D d, hn::Vec<D> v, T* p, All) {
  StoreAs(d, v, p);
}
template <class D, class T>
HWY_INLINE void Store(D d, hn::Vec<D> v, T* p, First part) {
  StoreFirst(d, v, p, part.n);
}

// Calls step(i, part) for each vector of [0, n): i is its first element, part goes to Load and
// Store.
template <class D, class F>
HWY_INLINE void ForVectors(D d, int64_t n, F step) {
  const int64_t lanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) step(i, All{});
  if (i < n) step(i, First{n - i});
}

// out[i] = f(d, in[i]...) for i in [0, n), computed in A's lanes.
template <class A, class F, class Out, class... In>
HWY_INLINE void Map(int64_t n, F f, Out* out, const In*... in) {
  const hn::ScalableTag<A> d;
  ForVectors(
      d, n, [&](int64_t i, auto part) { Store(d, f(d, Load(d, in + i, part)...), out + i, part); });
}

// The sum of term(i, part) over the vectors of [0, n). Four running sums hide the latency of an
// addition. Lanes past n must be 0.
template <class D, class F>
HWY_INLINE LaneOf<D> SumOver(D d, int64_t n, F term) {
  const int64_t lanes = hn::Lanes(d);
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    s0 = hn::Add(s0, term(i, All{}));
    s1 = hn::Add(s1, term(i + lanes, All{}));
    s2 = hn::Add(s2, term(i + 2 * lanes, All{}));
    s3 = hn::Add(s3, term(i + 3 * lanes, All{}));
  }
  for (; i + lanes <= n; i += lanes) s0 = hn::Add(s0, term(i, All{}));
  if (i < n) s1 = hn::Add(s1, term(i, First{n - i}));
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
}

// out [n] = (accumulate ? out : 0) + the rows of partial [rows, n], added in order.
template <class A, class T>
HWY_INLINE void SumPartials(T* out, bool accumulate, const A* partial, int64_t rows, int64_t n) {
  ParallelFor((n + 63) / 64, rows * n, [=](int64_t first, int64_t last) {
    const hn::ScalableTag<ComputeType<A, T>> d;
    const int64_t begin = first * 64, end = std::min(n, last * 64);
    ForVectors(d, end - begin, [&](int64_t i, auto part) {
      const int64_t at = begin + i;
      auto sum = hn::Zero(d);
      for (int64_t r = 0; r < rows; ++r) sum = hn::Add(sum, Load(d, partial + r * n + at, part));
      if (accumulate) sum = hn::Add(sum, Load(d, out + at, part));
      Store(d, sum, out + at, part);
    });
  });
}

// --- functions -----------------------------------------------------------------------------------

// e^x to 1 ulp for x up to 88 (f64: 706); 0 where it would be subnormal; NaN stays NaN.
template <class D>
HWY_INLINE hn::Vec<D> ExpOf(D d, hn::Vec<D> x) {
  return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));
}

// min(max(x, -limit), limit); NaN stays NaN, because x86 returns the second operand.
template <class D>
HWY_INLINE hn::Vec<D> Clip(D d, hn::Vec<D> x, double limit) {
  const auto v = hn::Set(d, static_cast<LaneOf<D>>(limit));
  return hn::Min(v, hn::Max(hn::Neg(v), x));
}

// The logistic function and its complement: s = 1 / (1 + e^-x), c = 1 - s without cancellation. x
// is kept where e^-x is finite, so that s c is 0 and not NaN far out.
template <class D>
struct Logistic {
  hn::Vec<D> s, c;
  HWY_INLINE Logistic(D d, hn::Vec<D> x) {
    const auto one = hn::Set(d, LaneOf<D>(1));
    const auto limit = hn::Set(d, LaneOf<D>(sizeof(LaneOf<D>) == 8 ? 700 : 87));
    const auto e = hn::Exp(d, hn::Min(limit, hn::Neg(x)));
    s = hn::Div(one, hn::Add(one, e));
    c = hn::Mul(e, s);
  }
};

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
