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

// out[i] = f(d, in[i]...) for i in [0, n), computed in A's lanes.
template <class A, class F, class Out, class... In>
HWY_INLINE void Map(int64_t n, F f, Out* out, const In*... in) {
  const hn::ScalableTag<A> d;
  const int64_t lanes = hn::Lanes(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) StoreAs(d, f(d, LoadAs(d, in + i)...), out + i);
  if (i < n) StoreFirst(d, f(d, LoadFirst(d, in + i, n - i)...), out + i, n - i);
}

// --- functions -----------------------------------------------------------------------------------

// e^x to 1 ulp. Arguments below the smallest normal result give 0; NaN is for the caller to keep.
template <class D>
HWY_INLINE hn::Vec<D> ExpOf(D d, hn::Vec<D> x) {
  return hn::Exp(d, x);
}

// The logistic function and its complement: s = 1 / (1 + e^-x), c = 1 - s without cancellation. x
// is kept where e^-x is finite, so that s c is 0 and not NaN far out.
template <class D>
struct Logistic {
  hn::Vec<D> s, c;
  HWY_INLINE Logistic(D d, hn::Vec<D> x) {
    const auto one = hn::Set(d, LaneOf<D>(1));
    const auto limit = hn::Set(d, LaneOf<D>(sizeof(LaneOf<D>) == 8 ? 700 : 87));
    const auto e = ExpOf(d, hn::Min(limit, hn::Neg(x)));
    s = hn::Div(one, hn::Add(one, e));
    c = hn::Mul(e, s);
  }
};

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
