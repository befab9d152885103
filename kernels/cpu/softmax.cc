#include "kernels/softmax.h"

#include <limits>

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/softmax.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// buffer [n] holds the exponentials, and is `out` where that is wide enough.
template <class T, class A>
void SoftmaxRow(T* out, const T* x, A* buffer, int64_t n) {
  const hn::ScalableTag<A> d;
  const auto lowest = hn::Set(d, -std::numeric_limits<A>::infinity());
  // A NaN may or may not survive Max; it survives ExpOf, and so reaches the sum and every element.
  auto running = lowest;
  ForVectors(d, n, [&](int64_t i, auto part) {
    auto v = Load(d, x + i, part);
    if constexpr (std::is_same_v<decltype(part), First>)
      v = hn::IfThenElse(hn::FirstN(d, part.n), v, lowest);
    running = hn::Max(running, v);
  });
  const auto top = hn::MaxOfLanes(d, running);
  const auto term = [&](int64_t i, auto part) {
    auto e = ExpOf(d, hn::Sub(Load(d, x + i, part), top));
    if constexpr (std::is_same_v<decltype(part), First>)
      e = hn::IfThenElseZero(hn::FirstN(d, part.n), e);
    Store(d, e, buffer + i, part);
    return e;
  };
  const auto inverse = hn::Set(d, A(1) / SumOver(d, n, term));
  Map<A>(
      n, [=](auto, auto e) { return hn::Mul(e, inverse); }, out, static_cast<const A*>(buffer));
}

template <class T>
void SoftmaxBackwardRow(T* dx, const T* dy, const T* out, int64_t n) {
  const hn::ScalableTag<Accumulator<T>> d;
  const auto dot = hn::Set(d, SumOver(d, n, [&](int64_t i, auto part) {
                             return hn::Mul(Load(d, dy + i, part), Load(d, out + i, part));
                           }));
  Map<Accumulator<T>>(
      n, [=](auto, auto g, auto p) { return hn::Mul(p, hn::Sub(g, dot)); }, dx, dy, out);
}

// buffers [threads, n] of Accumulator<T>, where that is not T.
void SoftmaxImpl(const View& out, const View& x, void* buffers) {
  const int64_t rows = x.dim(0), n = x.dim(1);
  VisitFloat(x.dtype, "Softmax", [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    ParallelSlots(rows, rows * n, [&](int slot, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* to = out.as<T>() + r * n;
        A* buffer;
        if constexpr (std::is_same_v<T, A>) {
          buffer = to;
        } else {
          buffer = static_cast<A*>(buffers) + slot * n;
        }
        SoftmaxRow(to, x.as<const T>() + r * n, buffer, n);
      }
    });
  });
}

void SoftmaxBackwardImpl(const View& dx, const View& dy, const View& out) {
  const int64_t rows = out.dim(0), n = out.dim(1);
  VisitFloat(out.dtype, "SoftmaxBackward", [&](auto tag) {
    using T = typename decltype(tag)::type;
    ParallelFor(rows, rows * n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        SoftmaxBackwardRow(dx.as<T>() + r * n, dy.as<const T>() + r * n, out.as<const T>() + r * n,
                           n);
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(SoftmaxImpl);
HWY_EXPORT(SoftmaxBackwardImpl);

}  // namespace

void Softmax(const Stream& stream, const View& out, const View& x) {
  CheckRank("Softmax", "x", x, 2);
  CheckArray("Softmax", "x", x, x.shape, x.dtype);
  CheckArray("Softmax", "out", out, x.shape, x.dtype);
  Scratch buffers(stream, x.dtype == DType::kBF16 ? KernelThreads() * x.dim(1) * sizeof(float) : 0);
  if (stream.counting()) return;
  HWY_DYNAMIC_DISPATCH(SoftmaxImpl)(out, x, buffers.as<void>());
}

void SoftmaxBackward(const Stream&, const View& dx, const View& dy, const View& out) {
  CheckRank("SoftmaxBackward", "out", out, 2);
  CheckArray("SoftmaxBackward", "out", out, out.shape, out.dtype);
  CheckArray("SoftmaxBackward", "dy", dy, out.shape, out.dtype);
  CheckArray("SoftmaxBackward", "dx", dx, out.shape, out.dtype);
  HWY_DYNAMIC_DISPATCH(SoftmaxBackwardImpl)(dx, dy, out);
}

}  // namespace shoal::kernels::cpu
#endif
