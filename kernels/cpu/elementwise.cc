#include "kernels/elementwise.h"

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/elementwise.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// out = f(d, in...) for arrays of one dtype.
template <class F, class... In>
void Pointwise(F f, const View& out, const In&... in) {
  VisitFloat(out.dtype, "elementwise", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool past = WritesPastCaches(out, {&in...});
    ParallelFlat(out.numel(), [&](int64_t begin, int64_t end) {
      MapPastCaches<Accumulator<T>>(end - begin, past, f, out.as<T>() + begin,
                                    static_cast<const T*>(in.data) + begin...);
    });
  });
}

template <class D>
HWY_INLINE hn::Vec<D> Constant(D d, double value) {
  return hn::Set(d, static_cast<LaneOf<D>>(value));
}

void AddImpl(const View& out, const View& a, const View& b, double alpha, double beta) {
  VisitFloat(out.dtype, "Add", [&](auto out_tag) {
    VisitFloat(a.dtype, "Add", [&](auto a_tag) {
      VisitFloat(b.dtype, "Add", [&](auto b_tag) {
        using Out = typename decltype(out_tag)::type;
        using A = typename decltype(a_tag)::type;
        using B = typename decltype(b_tag)::type;
        const bool past = WritesPastCaches(out, {&a, &b});
        ParallelFlat(out.numel(), [&](int64_t begin, int64_t end) {
          MapPastCaches<ComputeType<Out, A, B>>(
              end - begin, past,
              [=](auto d, auto x, auto y) {
                return hn::MulAdd(Constant(d, alpha), x, hn::Mul(Constant(d, beta), y));
              },
              out.as<Out>() + begin, a.as<const A>() + begin, b.as<const B>() + begin);
        });
      });
    });
  });
}

void ScaleImpl(const View& out, const View& x, double alpha) {
  Pointwise([=](auto d, auto v) { return hn::Mul(Constant(d, alpha), v); }, out, x);
}

void MultiplyImpl(const View& out, const View& a, const View& b) {
  Pointwise([](auto, auto x, auto y) { return hn::Mul(x, y); }, out, a, b);
}

void AddBiasImpl(const View& out, const View& x, const View& bias) {
  const int64_t rows = x.dim(0), n = x.dim(1);
  VisitFloat(out.dtype, "AddBias", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool past = WritesPastCaches(out, {&x}, n * sizeof(T));
    ParallelFor(rows, rows * n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        MapPastCaches<Accumulator<T>>(
            n, past, [](auto, auto v, auto b) { return hn::Add(v, b); }, out.as<T>() + r * n,
            x.as<const T>() + r * n, bias.as<const T>());
    });
  });
}

// With u = sqrt(2/pi) (x + 0.044715 x^3), (1 + tanh u) / 2 is the logistic function of 2u: that
// form keeps its relative accuracy where tanh u is close to -1.
constexpr double kGelu1 = 1.5957691216057308;  // 2 sqrt(2/pi)
constexpr double kGelu3 = 0.044715 * 1.5957691216057308;

void GeluImpl(const View& out, const View& x) {
  Pointwise(
      [](auto d, auto v) {
        const auto poly = hn::MulAdd(Constant(d, kGelu3), hn::Mul(v, v), Constant(d, kGelu1));
        return hn::Mul(v, Logistic(d, hn::Mul(v, poly)).s);
      },
      out, x);
}

void GeluBackwardImpl(const View& dx, const View& dy, const View& x) {
  Pointwise(
      [](auto d, auto g, auto v) {
        v = Clip(d, v, 20);  // outside, the derivative is 0 or 1 to the last bit
        const auto square = hn::Mul(v, v);
        const auto poly = hn::MulAdd(Constant(d, kGelu3), square, Constant(d, kGelu1));
        const auto slope = hn::MulAdd(Constant(d, 3 * kGelu3), square, Constant(d, kGelu1));
        const Logistic l(d, hn::Mul(v, poly));
        return hn::Mul(g, hn::MulAdd(hn::Mul(v, slope), hn::Mul(l.s, l.c), l.s));
      },
      dx, dy, x);
}

// silu'(v) = s (1 + v (1 - s)).
template <class D>
HWY_INLINE hn::Vec<D> SiluSlope(D d, const Logistic<D>& l, hn::Vec<D> v) {
  return hn::Mul(l.s, hn::MulAdd(Clip(d, v, 800), l.c, hn::Set(d, LaneOf<D>(1))));
}

void SiluImpl(const View& out, const View& x) {
  Pointwise([](auto d, auto v) { return hn::Mul(v, Logistic(d, v).s); }, out, x);
}

void SiluBackwardImpl(const View& dx, const View& dy, const View& x) {
  Pointwise([](auto d, auto g, auto v) { return hn::Mul(g, SiluSlope(d, Logistic(d, v), v)); }, dx,
            dy, x);
}

void SwiGluImpl(const View& out, const View& gate, const View& up) {
  Pointwise([](auto d, auto g, auto u) { return hn::Mul(hn::Mul(g, Logistic(d, g).s), u); }, out,
            gate, up);
}

void SwiGluBackwardImpl(const View& dgate, const View& dup, const View& dy, const View& gate,
                        const View& up) {
  VisitFloat(dy.dtype, "SwiGluBackward", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool past_gate = WritesPastCaches(dgate, {&dy, &gate, &up});
    const bool past_up = WritesPastCaches(dup, {&dy, &gate, &up});
    ParallelFlat(dy.numel(), [&](int64_t begin, int64_t end) {
      const hn::ScalableTag<Accumulator<T>> d;
      ForVectors(d, end - begin, [&](int64_t i, auto part) {
        const int64_t at = begin + i;
        const auto grad = Load(d, dy.as<const T>() + at, part);
        const auto g = Load(d, gate.as<const T>() + at, part);
        const auto u = Load(d, up.as<const T>() + at, part);
        const Logistic l(d, g);
        Store(d, hn::Mul(hn::Mul(grad, u), SiluSlope(d, l, g)), dgate.as<T>() + at, part,
              past_gate);
        Store(d, hn::Mul(grad, hn::Mul(g, l.s)), dup.as<T>() + at, part, past_up);
      });
      if (past_gate || past_up) hwy::FlushStream();
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(AddImpl);
HWY_EXPORT(ScaleImpl);
HWY_EXPORT(MultiplyImpl);
HWY_EXPORT(AddBiasImpl);
HWY_EXPORT(GeluImpl);
HWY_EXPORT(GeluBackwardImpl);
HWY_EXPORT(SiluImpl);
HWY_EXPORT(SiluBackwardImpl);
HWY_EXPORT(SwiGluImpl);
HWY_EXPORT(SwiGluBackwardImpl);

// All are contiguous arrays of out's shape and dtype.
void CheckSame(const char* op, const View& out, std::initializer_list<const View*> others) {
  CheckContiguous(op, "out", out);
  CheckPresent(op, "out", out);
  for (const View* v : others) CheckArray(op, "an argument", *v, out.shape, out.dtype);
}

}  // namespace

void Add(const Stream&, const View& out, const View& a, const View& b, double alpha, double beta) {
  CheckSame("Add", out, {});
  CheckArray("Add", "a", a, out.shape, a.dtype);
  CheckArray("Add", "b", b, out.shape, b.dtype);
  HWY_DYNAMIC_DISPATCH(AddImpl)(out, a, b, alpha, beta);
}
void Scale(const Stream&, const View& out, const View& x, double alpha) {
  CheckSame("Scale", out, {&x});
  HWY_DYNAMIC_DISPATCH(ScaleImpl)(out, x, alpha);
}
void Multiply(const Stream&, const View& out, const View& a, const View& b) {
  CheckSame("Multiply", out, {&a, &b});
  HWY_DYNAMIC_DISPATCH(MultiplyImpl)(out, a, b);
}
void AddBias(const Stream&, const View& out, const View& x, const View& bias) {
  CheckRank("AddBias", "x", x, 2);
  CheckSame("AddBias", out, {&x});
  CheckArray("AddBias", "bias", bias, {x.dim(1)}, x.dtype);
  HWY_DYNAMIC_DISPATCH(AddBiasImpl)(out, x, bias);
}
void Gelu(const Stream&, const View& out, const View& x) {
  CheckSame("Gelu", out, {&x});
  HWY_DYNAMIC_DISPATCH(GeluImpl)(out, x);
}
void GeluBackward(const Stream&, const View& dx, const View& dy, const View& x) {
  CheckSame("GeluBackward", dx, {&dy, &x});
  HWY_DYNAMIC_DISPATCH(GeluBackwardImpl)(dx, dy, x);
}
void Silu(const Stream&, const View& out, const View& x) {
  CheckSame("Silu", out, {&x});
  HWY_DYNAMIC_DISPATCH(SiluImpl)(out, x);
}
void SiluBackward(const Stream&, const View& dx, const View& dy, const View& x) {
  CheckSame("SiluBackward", dx, {&dy, &x});
  HWY_DYNAMIC_DISPATCH(SiluBackwardImpl)(dx, dy, x);
}
void SwiGlu(const Stream&, const View& out, const View& gate, const View& up) {
  CheckSame("SwiGlu", out, {&gate, &up});
  HWY_DYNAMIC_DISPATCH(SwiGluImpl)(out, gate, up);
}
void SwiGluBackward(const Stream&, const View& dgate, const View& dup, const View& dy,
                    const View& gate, const View& up) {
  CheckSame("SwiGluBackward", dgate, {&dup, &dy, &gate, &up});
  HWY_DYNAMIC_DISPATCH(SwiGluBackwardImpl)(dgate, dup, dy, gate, up);
}

}  // namespace shoal::kernels::cpu
#endif
