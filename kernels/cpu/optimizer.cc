#include "kernels/optimizer.h"

#include <cmath>

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/optimizer.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// Calls f(tag of the state's type A, tag of the gradient's type G). The state is the master copy of
// a bf16 parameter, or the parameter itself.
template <class F>
void VisitState(const View& parameter, const View& gradient, F f) {
  VisitFloat(gradient.dtype, "optimizer", [&](auto g) {
    if (parameter.dtype == DType::kF64) {
      f(TypeTag<double>{}, g);
    } else {
      f(TypeTag<float>{}, g);
    }
  });
}

// Where the exact parameter is.
template <class A>
struct ExactParameter {
  A* whole;       // it alone, or the master; null if `rest` is there
  BF16* nearest;  // null without a master
  int16_t* rest;
  bool past;  // caches, of `nearest`

  ExactParameter(const View& parameter, const View& master, const View& gradient)
      : whole(master.dtype == DType::kI16 ? nullptr : (master ? master : parameter).as<A>()),
        nearest(master ? parameter.as<BF16>() : nullptr),
        rest(whole ? nullptr : master.as<int16_t>()),
        past(whole && master && WritesPastCaches(parameter, {&gradient})) {}

  template <class D, class Part>
  HWY_INLINE hn::Vec<D> Load(D d, int64_t at, Part part) const {
    if constexpr (std::is_same_v<LaneOf<D>, float>) {
      if (rest) {
        const hn::RebindToSigned<D> di;
        const auto bits = hn::BitCast(di, HWY_NAMESPACE::Load(d, nearest + at, part));
        return hn::BitCast(
            d, hn::Add(bits, hn::ConvertTo(di, HWY_NAMESPACE::Load(d, rest + at, part))));
      }
    }
    return HWY_NAMESPACE::Load(d, whole + at, part);
  }

  template <class D, class Part>
  HWY_INLINE void Store(D d, hn::Vec<D> v, int64_t at, Part part) const {
    if constexpr (std::is_same_v<LaneOf<D>, float>) {
      if (rest) {
        const hn::RebindToUnsigned<D> du;
        const hn::RebindToSigned<D> di;
        const auto nan = hn::Set(du, 0x7fc00000);
        const auto u = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), nan, hn::BitCast(du, v));
        const auto upper = hn::And(hn::Add(u, hn::Set(du, 0x8000)), hn::Set(du, 0xffff0000));
        const auto lower = hn::ConvertTo(d, hn::BitCast(di, hn::Sub(u, upper)));
        HWY_NAMESPACE::Store(d, hn::BitCast(d, upper), nearest + at, part);
        HWY_NAMESPACE::Store(d, lower, rest + at, part);
        return;
      }
    }
    HWY_NAMESPACE::Store(d, v, whole + at, part);
    if (nearest) HWY_NAMESPACE::Store(d, v, nearest + at, part, past);
  }
};

void AdamWImpl(const View& parameter, const View& master, const View& m, const View& v,
               const View& gradient, const AdamWOptions& o) {
  VisitState(parameter, gradient, [&](auto state_tag, auto gradient_tag) {
    using A = typename decltype(state_tag)::type;
    using G = typename decltype(gradient_tag)::type;
    using C = ComputeType<A, G>;
    const double t = static_cast<double>(o.step);
    const double correction1 = 1 - std::pow(o.beta1, t), correction2 = 1 - std::pow(o.beta2, t);
    const ExactParameter<A> exact(parameter, master, gradient);
    A *m_data = m.as<A>(), *v_data = v.as<A>();
    const G* g_data = gradient.as<const G>();
    ParallelFlat(parameter.numel(), [=](int64_t begin, int64_t end) {
      const hn::ScalableTag<C> d;
      const auto set = [d](double x) { return hn::Set(d, static_cast<C>(x)); };
      const auto beta1 = set(o.beta1), rest1 = set(1 - o.beta1);
      const auto beta2 = set(o.beta2), rest2 = set(1 - o.beta2);
      const auto scale = set(o.gradient_scale);
      const auto keep = set(1 - o.lr * o.weight_decay), rate = set(o.lr / correction1);
      const auto root2 = set(1 / std::sqrt(correction2)), eps = set(o.eps);
      ForVectors(d, end - begin, [&](int64_t i, auto part) {
        const int64_t at = begin + i;
        const auto g = hn::Mul(scale, Load(d, g_data + at, part));
        const auto m1 = hn::MulAdd(rest1, g, hn::Mul(beta1, Load(d, m_data + at, part)));
        const auto v1 =
            hn::MulAdd(hn::Mul(rest2, g), g, hn::Mul(beta2, Load(d, v_data + at, part)));
        const auto denominator = hn::MulAdd(hn::Sqrt(v1), root2, eps);
        const auto p =
            hn::NegMulAdd(rate, hn::Div(m1, denominator), hn::Mul(keep, exact.Load(d, at, part)));
        Store(d, m1, m_data + at, part);
        Store(d, v1, v_data + at, part);
        exact.Store(d, p, at, part);
      });
      if (exact.past) hwy::FlushStream();
    });
  });
}

void SgdImpl(const View& parameter, const View& master, const View& momentum, const View& gradient,
             const SgdOptions& o) {
  VisitState(parameter, gradient, [&](auto state_tag, auto gradient_tag) {
    using A = typename decltype(state_tag)::type;
    using G = typename decltype(gradient_tag)::type;
    using C = ComputeType<A, G>;
    const ExactParameter<A> exact(parameter, master, gradient);
    A* u_data = momentum.as<A>();
    const G* g_data = gradient.as<const G>();
    ParallelFlat(parameter.numel(), [=](int64_t begin, int64_t end) {
      const hn::ScalableTag<C> d;
      const auto set = [d](double x) { return hn::Set(d, static_cast<C>(x)); };
      const auto lr = set(o.lr), decay = set(o.weight_decay), scale = set(o.gradient_scale);
      const auto mu = set(o.momentum);
      ForVectors(d, end - begin, [&](int64_t i, auto part) {
        const int64_t at = begin + i;
        const auto p = exact.Load(d, at, part);
        auto u = hn::MulAdd(decay, p, hn::Mul(scale, Load(d, g_data + at, part)));
        if (u_data) {
          if (!o.first) u = hn::MulAdd(mu, Load(d, u_data + at, part), u);
          Store(d, u, u_data + at, part);
        }
        const auto next = hn::NegMulAdd(lr, u, p);
        exact.Store(d, next, at, part);
      });
      if (exact.past) hwy::FlushStream();
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(AdamWImpl);
HWY_EXPORT(SgdImpl);

void CheckFlat(const char* op, const View& parameter, const View& master, const View& gradient) {
  CheckRank(op, "parameter", parameter, 1);
  CheckArray(op, "parameter", parameter, parameter.shape, parameter.dtype);
  CheckArray(op, "gradient", gradient, parameter.shape, gradient.dtype);
  const bool needs_master = parameter.dtype == DType::kBF16 && parameter.numel() > 0;
  SHOAL_CHECK(static_cast<bool>(master) == needs_master || parameter.numel() == 0, op,
              "a parameter of {} {} a master copy", ::shoal::Name(parameter.dtype),
              needs_master ? "needs" : "has no use for");
  if (!needs_master) return;
  const bool split = master.dtype == DType::kI16;
  CheckArray(op, "master", master, parameter.shape, split ? DType::kI16 : DType::kF32);
  SHOAL_CHECK(!split || gradient.dtype != DType::kF64, op,
              "a split master takes gradients of f32 or bf16");
}

}  // namespace

void AdamW(const Stream&, const View& parameter, const View& master, const View& m, const View& v,
           const View& gradient, const AdamWOptions& options) {
  CheckFlat("AdamW", parameter, master, gradient);
  CheckArray("AdamW", "m", m, parameter.shape, AccumulatorDType(parameter.dtype));
  CheckArray("AdamW", "v", v, parameter.shape, AccumulatorDType(parameter.dtype));
  SHOAL_CHECK(options.step >= 1, "AdamW", "step is {}, but counts from 1", options.step);
  HWY_DYNAMIC_DISPATCH(AdamWImpl)(parameter, master, m, v, gradient, options);
}

void Sgd(const Stream&, const View& parameter, const View& master, const View& momentum,
         const View& gradient, const SgdOptions& options) {
  CheckFlat("Sgd", parameter, master, gradient);
  if (momentum)
    CheckArray("Sgd", "momentum", momentum, parameter.shape, AccumulatorDType(parameter.dtype));
  SHOAL_CHECK(momentum || options.momentum == 0 || parameter.numel() == 0, "Sgd",
              "momentum is {} but its buffer is absent", options.momentum);
  HWY_DYNAMIC_DISPATCH(SgdImpl)(parameter, master, momentum, gradient, options);
}

}  // namespace shoal::kernels::cpu
#endif
