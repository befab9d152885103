#include <cmath>

#include "kernels/optimizer.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

// Arguments of both: parameter, master (absent unless the parameter is bf16), state, gradient.
struct Types {
  DType parameter, gradient;
  DType master = DType::kF32;
  std::string name() const {
    return fmt::format("{}_g{}{}", Name(parameter), Name(gradient),
                       master == DType::kF32 ? "" : "_split");
  }
  bool has_master() const { return parameter == DType::kBF16; }
  DType state() const { return AccumulatorDType(parameter); }
};

Case AdamWCase(std::string name, Types t, int64_t n, AdamWOptions o) {
  const Arg state = InOut(t.state(), {n});
  // Before the first step the moments are 0.
  const Arg m = o.step == 1 ? state.Values({0}) : state.Range(-0.1, 0.1);
  const Arg v = o.step == 1 ? state.Values({0}) : state.Range(0, 0.01);
  return {
      .name = "AdamW/" + name,
      .args = {t.has_master() ? Out(t.parameter, {n}) : InOut(t.parameter, {n}),
               t.has_master() ? InOut(t.master, {n}) : Absent(), m, v, In(t.gradient, {n})},
      .kernel = [o](const Stream& s, const Views& a) { AdamW(s, a[0], a[1], a[2], a[3], a[4], o); },
      .reference =
          [o, t](Arrays& a) {
            Array& p = t.has_master() ? a[1] : a[0];
            for (int64_t i = 0; i < a[0].numel(); ++i) {
              const double g = a[4][i] * o.gradient_scale;
              a[2][i] = o.beta1 * a[2][i] + (1 - o.beta1) * g;
              a[3][i] = o.beta2 * a[3][i] + (1 - o.beta2) * g * g;
              const double m_hat = a[2][i] / (1 - std::pow(o.beta1, o.step));
              const double v_hat = a[3][i] / (1 - std::pow(o.beta2, o.step));
              p[i] -= o.lr * o.weight_decay * p[i];
              p[i] -= o.lr * m_hat / (std::sqrt(v_hat) + o.eps);
              a[0][i] = p[i];
            }
          },
      .tolerance = {1e-12, 2e-6, 4e-3}};
}

Case SgdCase(std::string name, Types t, int64_t n, SgdOptions o) {
  const Arg momentum = o.momentum == 0 ? Absent()
                       : o.first       ? Out(t.state(), {n})
                                       : InOut(t.state(), {n});
  return {.name = "Sgd/" + name,
          .args = {t.has_master() ? Out(t.parameter, {n}) : InOut(t.parameter, {n}),
                   t.has_master() ? InOut(t.master, {n}) : Absent(), momentum, In(t.gradient, {n})},
          .kernel = [o](const Stream& s, const Views& a) { Sgd(s, a[0], a[1], a[2], a[3], o); },
          .reference =
              [o, t](Arrays& a) {
                Array& p = t.has_master() ? a[1] : a[0];
                for (int64_t i = 0; i < a[0].numel(); ++i) {
                  double u = a[3][i] * o.gradient_scale + o.weight_decay * p[i];
                  if (o.momentum != 0) {
                    if (!o.first) u += o.momentum * a[2][i];
                    a[2][i] = u;
                  }
                  p[i] -= o.lr * u;
                  a[0][i] = p[i];
                }
              }};
}

// Of the args of a kernel with a split master, `update`d exactly: their bits are to be those of
// Split and Join.
Case SplitCase(Case c, double (*update)(double p, double g)) {
  const size_t last = c.args.size() - 1;
  c.args[0] = InOut(DType::kBF16, c.args[0].shape).Range(1, 1.75);
  c.reference = [last, update](Arrays& a) {
    for (int64_t i = 0; i < a[0].numel(); ++i) {
      const float p = Join(BF16(a[0][i]), static_cast<int16_t>(a[1][i]));
      const SplitFloat next = Split(static_cast<float>(update(p, a[last][i])));
      a[0][i] = static_cast<double>(next.nearest);
      a[1][i] = next.rest;
    }
  };
  c.tolerance = {0, 0, 0};
  return c;
}

const CaseFile kCases([](std::vector<Case>& cases) {
  for (DType parameter : kFloats) {
    for (DType gradient : kFloats) {
      const Types t{parameter, gradient};
      for (int64_t n : {0, 1, 3, 65, 40003})
        for (int64_t step : {1, 7, 100000})
          cases.push_back(
              AdamWCase(fmt::format("{}/{}_step{}", t.name(), n, step), t, n,
                        {.lr = 0.01, .weight_decay = 0.1, .step = step, .gradient_scale = 0.37}));
      for (bool first : {false, true})
        for (double momentum : {0.0, 0.9})
          for (int64_t n : {0, 1, 65, 40003}) {
            if (n == 0 && momentum == 0) continue;
            cases.push_back(SgdCase(
                fmt::format("{}/{}_momentum{}_first_{}", t.name(), n, momentum, first), t, n,
                {.momentum = momentum, .weight_decay = 0.01, .gradient_scale = 2, .first = first}));
          }
    }
  }
  // Updates without rounding: what is stored is what the kernel's own arithmetic must give.
  for (DType gradient : {DType::kF32, DType::kBF16}) {
    const Types t{DType::kBF16, gradient, DType::kI16};
    for (int64_t n : {1, 3, 65, 40003}) {
      const std::string name = fmt::format("{}/{}", t.name(), n);
      Case sgd = SplitCase(SgdCase(name, t, n, {.lr = 0x1p-8}),
                           [](double p, double g) { return p - 0x1p-8 * g; });
      sgd.args[1] = sgd.args[1].Range(-32768, 32767);
      sgd.args[3] = sgd.args[3].Values({-1, 0, 0.5, 1.0 / 16, -13.0 / 16, NAN, 3, INFINITY, 0.25});
      cases.push_back(sgd);
      Case decay = SplitCase(AdamWCase(name, t, n, {.lr = 0.5, .weight_decay = 0.25}),
                             [](double p, double) { return p * 0.875; });
      decay.args[1] = decay.args[1].Values({0, 8, -8, 4096, -32768, 32760, -16});
      decay.args[4] = decay.args[4].Values({0});
      cases.push_back(decay);
    }
  }
  // No gradient and no moments: nothing but decay; no decay: nothing at all.
  const Types f32{DType::kF32, DType::kF32}, mixed{DType::kBF16, DType::kBF16};
  for (double decay : {0.0, 0.1}) {
    cases.push_back(
        AdamWCase(fmt::format("zero/decay{}", decay), f32, 67, {.weight_decay = decay}));
    cases.back().args[4].values = {0};
  }
  cases.push_back(AdamWCase("nan", f32, 67, {.step = 3}));
  cases.back().args[4].values = {1, std::nan(""), 2};
  cases.push_back(AdamWCase("huge", f32, 67, {.step = 3, .gradient_scale = 1e-20}));
  cases.back().args[4].values = {1e30, -1e38, 2};
  const Types split{DType::kBF16, DType::kBF16, DType::kI16};
  for (Types t : {f32, mixed, split, Types{DType::kBF16, DType::kF32}}) {
    for (Case c : {AdamWCase("bench/" + t.name(), t, 1 << 25, {.step = 3}),
                   SgdCase("bench/" + t.name(), t, 1 << 25, {.momentum = 0.9, .first = false})}) {
      c.benchmark = true;
      c.test = false;
      cases.push_back(c);
    }
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
