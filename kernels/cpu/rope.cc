#include "kernels/rope.h"

#include <cmath>

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rope.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// turns [half]: full turns per position. Angles are reduced in f64, so that they are right at any
// position in any dtype.
template <class A>
void CosSin(int32_t position, const double* turns, int64_t half, bool inverse, A* cosines,
            A* sines) {
  const hn::ScalableTag<double> d;
  const auto p = hn::Set(d, position);
  const auto two_pi = hn::Set(d, inverse ? -6.283185307179586 : 6.283185307179586);
  ForVectors(d, half, [&](int64_t i, auto part) {
    const auto all = hn::Mul(p, Load(d, turns + i, part));
    const auto angle = hn::Mul(hn::Sub(all, hn::Round(all)), two_pi);
    Store(d, hn::Cos(d, angle), cosines + i, part);
    Store(d, hn::Sin(d, angle), sines + i, part);
  });
}

template <class T, class A>
HWY_INLINE void RotateHead(T* out, const T* x, const A* cosines, const A* sines, int64_t half) {
  const hn::ScalableTag<A> d;
  ForVectors(d, half, [&](int64_t i, auto part) {
    const auto c = Load(d, cosines + i, part), s = Load(d, sines + i, part);
    const auto a = Load(d, x + i, part), b = Load(d, x + half + i, part);
    Store(d, hn::NegMulAdd(b, s, hn::Mul(a, c)), out + i, part);
    Store(d, hn::MulAdd(a, s, hn::Mul(b, c)), out + half + i, part);
  });
}

// table [threads, 2, half] of A.
void RopeImpl(const View& out, const View& x, const View& positions, const double* turns,
              bool inverse, void* table) {
  const int64_t batch = x.dim(0), time = x.dim(1), heads = x.dim(2), half = x.dim(3) / 2;
  const Dims &os = out.strides, &xs = x.strides;
  VisitFloat(x.dtype, "Rope", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    ParallelSlots(time, x.numel(), [&](int slot, int64_t begin, int64_t end) {
      A* cosines = static_cast<A*>(table) + slot * 2 * half;
      A* sines = cosines + half;
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t b = 0; b < batch; ++b) {
          // Sequences of a batch mostly share their positions, and then the table.
          const int32_t* position = positions.as<const int32_t>() + b * time + t;
          if (b == 0 || *position != position[-time])
            CosSin(*position, turns, half, inverse, cosines, sines);
          T* to = out.as<T>() + b * os[0] + t * os[1];
          const T* from = x.as<const T>() + b * xs[0] + t * xs[1];
          for (int64_t h = 0; h < heads; ++h)
            RotateHead(to + h * os[2], from + h * xs[2], cosines, sines, half);
        }
      }
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(RopeImpl);

}  // namespace

void Rope(const Stream& stream, const View& out, const View& x, const View& positions, double theta,
          bool inverse) {
  CheckRank("Rope", "x", x, 4);
  CheckShape("Rope", "out", out, x.shape);
  CheckDType("Rope", "out", out, x.dtype);
  CheckArray("Rope", "positions", positions, {x.dim(0), x.dim(1)}, DType::kI32);
  const int64_t width = x.dim(3), half = width / 2;
  SHOAL_CHECK(width % 2 == 0, "Rope", "head dimension {} is odd", width);
  SHOAL_CHECK(width == 0 || (x.strides[3] == 1 && out.strides[3] == 1), "Rope",
              "last strides {} of x and {} of out are not 1", x.strides[3], out.strides[3]);
  if (x.numel() == 0) return;
  Scratch scratch(stream, half * (1 + 2 * KernelThreads()) * sizeof(double));
  if (stream.counting()) return;
  double* turns = scratch.as<double>();
  for (int64_t i = 0; i < half; ++i)
    turns[i] = std::pow(theta, -2.0 * i / width) / 6.283185307179586;
  HWY_DYNAMIC_DISPATCH(RopeImpl)(out, x, positions, turns, inverse, turns + half);
}

}  // namespace shoal::kernels::cpu
#endif
