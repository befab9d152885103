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
#include "hwy/cache_control.h"
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
template <class D, IfFloat<D> = 0>
HWY_INLINE hn::Vec<D> LoadAs(D d, const int16_t* p) {
  const hn::Rebind<int16_t, D> d16;
  const hn::RebindToSigned<D> di;
  return hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d16, p)));
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
// Whole numbers that fit.
template <class D, IfFloat<D> = 0>
HWY_INLINE void StoreAs(D, hn::Vec<D> v, int16_t* p) {
  const hn::Rebind<int16_t, D> d16;
  const hn::RebindToSigned<D> di;
  hn::StoreU(hn::DemoteTo(d16, hn::ConvertTo(di, v)), d16, p);
}
template <class D, class T, IfDoubleFrom<D, T> = 0>
HWY_INLINE void StoreAs(D, hn::Vec<D> v, T* p) {
  const hn::Rebind<float, D> df;
  StoreAs(df, hn::DemoteTo(df, v), p);
}

// Past the caches; p is aligned to the bytes written. End with hwy::FlushStream().
template <class D>
HWY_INLINE void StreamAs(D d, hn::Vec<D> v, LaneOf<D>* p) {
  hn::Stream(v, d, p);
}
template <class D, IfFloat<D> = 0>
HWY_INLINE void StreamAs(D d, hn::Vec<D> v, BF16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::RebindToSigned<D> di;
  hn::Stream(hn::DemoteTo(d16, hn::BitCast(di, RoundToBF16(d, v))), d16,
             reinterpret_cast<uint16_t*>(p));
}
template <class D, class T, IfDoubleFrom<D, T> = 0>
HWY_INLINE void StreamAs(D, hn::Vec<D> v, T* p) {
  const hn::Rebind<float, D> df;
  StreamAs(df, hn::DemoteTo(df, v), p);
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

// Store, past the caches if `past` (WritesPastCaches).
template <class D, class T>
HWY_INLINE void Store(D d, hn::Vec<D> v, T* p, All, bool past) {
  past ? StreamAs(d, v, p) : StoreAs(d, v, p);
}
template <class D, class T>
HWY_INLINE void Store(D d, hn::Vec<D> v, T* p, First part, bool) {
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

template <class A, class F, class Out, class... In>
HWY_INLINE void MapPastCaches(int64_t n, bool past, F f, Out* out, const In*... in) {
  const hn::ScalableTag<A> d;
  ForVectors(d, n, [&](int64_t i, auto part) {
    Store(d, f(d, Load(d, in + i, part)...), out + i, part, past);
  });
  if (past) hwy::FlushStream();
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

// min(max(x, -limit), limit); NaN stays NaN, because x86 returns the second operand.
template <class D>
HWY_INLINE hn::Vec<D> Clip(D d, hn::Vec<D> x, double limit) {
  const auto v = hn::Set(d, static_cast<LaneOf<D>>(limit));
  return hn::Min(v, hn::Max(hn::Neg(v), x));
}

// e^x for |x| <= 87 (f64: 700), to 1 ulp.
template <class D, IfFloat<D> = 0>
HWY_INLINE hn::Vec<D> ExpInRange(D d, hn::Vec<D> x) {
  const hn::RebindToSigned<D> di;
  // x = k ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 leaves k in the low bits of the sum; ln
  // 2 is a sum of two floats, of which the first has few bits, so that its product with k is exact.
  const auto shift = hn::Set(d, 0x1.8p23f);
  const auto sum = hn::MulAdd(x, hn::Set(d, 1.44269504f), shift);
  const auto k = hn::Sub(sum, shift);
  auto r = hn::NegMulAdd(k, hn::Set(d, 0x1.62e4p-1f), x);
  r = hn::NegMulAdd(k, hn::Set(d, 0x1.7f7d1cp-20f), r);
  // e^r = 1 + r + r^2 p(r); p is the polynomial of least relative error (3e-9) in e^r.
  auto p = hn::MulAdd(hn::Set(d, 0.00138145976f), r, hn::Set(d, 0.00836871658f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.041668389f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.166665211f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.49999994f));
  p = hn::Add(hn::MulAdd(p, hn::Mul(r, r), r), hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, sum));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
}
template <class D, std::enable_if_t<std::is_same_v<LaneOf<D>, double>, int> = 0>
HWY_INLINE hn::Vec<D> ExpInRange(D d, hn::Vec<D> x) {
  return hn::Exp(d, x);
}

constexpr double ExpLimit(size_t size_of_lane) { return size_of_lane == 8 ? 700 : 87; }

// e^x for x <= 87 (f64: 700), to 1 ulp; 0 for x < -87 (f64: -700); NaN stays NaN.
template <class D>
HWY_INLINE hn::Vec<D> ExpOf(D d, hn::Vec<D> x) {
  const double limit = ExpLimit(sizeof(LaneOf<D>));
  const auto low = hn::Set(d, static_cast<LaneOf<D>>(-limit));
  const auto e = ExpInRange(d, Clip(d, x, limit));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::IfThenElseZero(hn::Ge(x, low), e));
}

// 1 / x for x in [1, 2^126], to 2 ulp.
template <class D, IfFloat<D> = 0>
HWY_INLINE hn::Vec<D> Reciprocal(D d, hn::Vec<D> x) {
  const auto y = hn::ApproximateReciprocal(x);  // at least 12 bits, and then a step of Newton's
  return hn::MulAdd(y, hn::NegMulAdd(x, y, hn::Set(d, 1.0f)), y);
}
template <class D, std::enable_if_t<std::is_same_v<LaneOf<D>, double>, int> = 0>
HWY_INLINE hn::Vec<D> Reciprocal(D d, hn::Vec<D> x) {
  return hn::Div(hn::Set(d, 1.0), x);
}

// The logistic function and its complement: s = 1 / (1 + e^-x), c = 1 - s without cancellation. x
// is kept where e^-x is finite, so that s c is 0 and not NaN far out.
template <class D>
struct Logistic {
  hn::Vec<D> s, c;
  HWY_INLINE Logistic(D d, hn::Vec<D> x) {
    const auto e = ExpInRange(d, hn::Neg(Clip(d, x, ExpLimit(sizeof(LaneOf<D>)))));
    s = Reciprocal(d, hn::Add(hn::Set(d, LaneOf<D>(1)), e));
    c = hn::Mul(e, s);
  }
};

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
