#include "kernels/quantize.h"

#include <cstring>
#include <limits>

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/quantize.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// Whole numbers of at most 127 <-> i8.
template <class D, IfFloat<D> = 0>
HWY_INLINE hn::Vec<hn::Rebind<int32_t, D>> ToInts(D, hn::Vec<D> v) {
  return hn::NearestInt(v);
}
template <class D, std::enable_if_t<std::is_same_v<LaneOf<D>, double>, int> = 0>
HWY_INLINE hn::Vec<hn::Rebind<int32_t, D>> ToInts(D, hn::Vec<D> v) {
  return hn::DemoteTo(hn::Rebind<int32_t, D>(), hn::Round(v));
}
template <class D, IfFloat<D> = 0>
HWY_INLINE hn::Vec<D> FromInts(D d, hn::Vec<hn::Rebind<int32_t, D>> v) {
  return hn::ConvertTo(d, v);
}
template <class D, std::enable_if_t<std::is_same_v<LaneOf<D>, double>, int> = 0>
HWY_INLINE hn::Vec<D> FromInts(D d, hn::Vec<hn::Rebind<int32_t, D>> v) {
  return hn::PromoteTo(d, v);
}
template <class D>
HWY_INLINE void StoreCodes(D d, hn::Vec<D> v, int8_t* codes, All) {
  const hn::Rebind<int8_t, D> d8;
  hn::StoreU(hn::DemoteTo(d8, ToInts(d, v)), d8, codes);
}
template <class D>
HWY_INLINE void StoreCodes(D d, hn::Vec<D> v, int8_t* codes, First part) {
  int8_t buffer[hn::MaxLanes(d)];
  StoreCodes(d, v, buffer, All{});
  std::memcpy(codes, buffer, static_cast<size_t>(part.n));
}
template <class D>
HWY_INLINE hn::Vec<D> LoadCodes(D d, const int8_t* codes, All) {
  const hn::Rebind<int8_t, D> d8;
  return FromInts(d, hn::PromoteTo(hn::Rebind<int32_t, D>(), hn::LoadU(d8, codes)));
}
template <class D>
HWY_INLINE hn::Vec<D> LoadCodes(D d, const int8_t* codes, First part) {
  int8_t buffer[hn::MaxLanes(d)] = {};
  std::memcpy(buffer, codes, static_cast<size_t>(part.n));
  return LoadCodes(d, buffer, All{});
}

template <class T>
float QuantizeBlock(int8_t* codes, const T* x, int64_t n) {
  using A = Accumulator<T>;
  const hn::ScalableTag<A> d;
  const auto largest = hn::Set(d, A(kQuantizeLargest));
  auto most = hn::Zero(d), excess = hn::Zero(d);
  ForVectors(d, n, [&](int64_t i, auto part) {
    const auto v = hn::Abs(Load(d, x + i, part));
    // False for NaN too, which Max may drop.
    excess = hn::IfThenElse(hn::Le(v, largest), excess, hn::Set(d, A(1)));
    most = hn::Max(most, v);
  });
  const A top = hn::GetLane(hn::MaxOfLanes(d, most));
  const bool too_large = hn::GetLane(hn::MaxOfLanes(d, excess)) > 0;
  if (too_large || top < A(kQuantizeSmallest)) {
    std::memset(codes, 0, static_cast<size_t>(n));
    return too_large ? std::numeric_limits<float>::quiet_NaN() : 0;
  }
  const auto levels = hn::Set(d, A(127)), divisor = hn::Set(d, top);
  ForVectors(d, n, [&](int64_t i, auto part) {
    StoreCodes(d, hn::Div(hn::Mul(Load(d, x + i, part), levels), divisor), codes + i, part);
  });
  return static_cast<float>(top / 127);
}

template <class T>
void DequantizeBlock(T* x, const int8_t* codes, float scale, int64_t n) {
  using A = Accumulator<T>;
  const hn::ScalableTag<A> d;
  const auto s = hn::Set(d, A(scale));
  ForVectors(d, n, [&](int64_t i, auto part) {
    Store(d, hn::Mul(LoadCodes(d, codes + i, part), s), x + i, part);
  });
}

// Calls f(offset of the block's values, its scale's index, its size).
template <class F>
void ForBlocks(int64_t rows, int64_t n, F f) {
  const int64_t blocks = QuantizeBlocks(n);
  ParallelFor(rows * blocks, rows * n, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b % blocks * kQuantizeBlock;
      f(b / blocks * n + at, b, std::min(kQuantizeBlock, n - at));
    }
  });
}

void QuantizeImpl(const View& codes, const View& scales, const View& x) {
  VisitFloat(x.dtype, "Quantize", [&](auto tag) {
    using T = typename decltype(tag)::type;
    ForBlocks(x.dim(0), x.dim(1), [&](int64_t at, int64_t block, int64_t n) {
      scales.as<float>()[block] = QuantizeBlock(codes.as<int8_t>() + at, x.as<const T>() + at, n);
    });
  });
}

void DequantizeImpl(const View& x, const View& codes, const View& scales) {
  VisitFloat(x.dtype, "Dequantize", [&](auto tag) {
    using T = typename decltype(tag)::type;
    ForBlocks(x.dim(0), x.dim(1), [&](int64_t at, int64_t block, int64_t n) {
      DequantizeBlock(x.as<T>() + at, codes.as<const int8_t>() + at,
                      scales.as<const float>()[block], n);
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(QuantizeImpl);
HWY_EXPORT(DequantizeImpl);

void CheckQuantized(const char* op, const View& x, const View& codes, const View& scales) {
  CheckRank(op, "x", x, 2);
  CheckArray(op, "x", x, x.shape, x.dtype);
  CheckArray(op, "codes", codes, x.shape, DType::kI8);
  CheckArray(op, "scales", scales, {x.dim(0), QuantizeBlocks(x.dim(1))}, DType::kF32);
}

}  // namespace

void Quantize(const Stream&, const View& codes, const View& scales, const View& x) {
  CheckQuantized("Quantize", x, codes, scales);
  HWY_DYNAMIC_DISPATCH(QuantizeImpl)(codes, scales, x);
}

void Dequantize(const Stream&, const View& x, const View& codes, const View& scales) {
  CheckQuantized("Dequantize", x, codes, scales);
  HWY_DYNAMIC_DISPATCH(DequantizeImpl)(x, codes, scales);
}

}  // namespace shoal::kernels::cpu
#endif
