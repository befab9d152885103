#include <cmath>

#include "kernels/elementwise.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference/elementwise.h"

namespace shoal::kernels::testing {
namespace {

using Function = double (*)(double);
using Unary = void (*)(const Stream&, const View&, const View&);
using Binary = void (*)(const Stream&, const View&, const View&, const View&);

// f(x), and x's special values: where exponentials overflow, where x^3 does, and NaN.
Case UnaryCase(std::string name, Unary kernel, Function f, Arg out, Arg x) {
  return {.name = std::move(name),
          .args = {x, out},
          .kernel = [kernel](const Stream& s, const Views& a) { kernel(s, a[1], a[0]); },
          .reference =
              [f](Arrays& a) {
                for (int64_t i = 0; i < a[0].numel(); ++i) a[1][i] = f(a[0][i]);
              }};
}

// dy f'(x), where slope is f'.
Case BackwardCase(std::string name, Binary kernel, Function f, Function slope, Arg dx, Arg dy,
                  Arg x) {
  return {.name = std::move(name),
          .args = {dy, x, dx},
          .kernel = [kernel](const Stream& s, const Views& a) { kernel(s, a[2], a[0], a[1]); },
          .reference =
              [slope](Arrays& a) {
                for (int64_t i = 0; i < a[1].numel(); ++i) a[2][i] = a[0][i] * slope(a[1][i]);
              },
          .gradient = {[f](const Arrays& a) {
                         double sum = 0;
                         for (int64_t i = 0; i < a[1].numel(); ++i) sum += a[0][i] * f(a[1][i]);
                         return sum;
                       },
                       {{2, 1}}}};
}

Case AddCase(std::string name, Arg a, Arg b, Arg out, double alpha, double beta) {
  return {.name = "Add/" + name,
          .args = {a, b, out},
          .kernel = [=](const Stream& s, const Views& v) { Add(s, v[2], v[0], v[1], alpha, beta); },
          .reference =
              [=](Arrays& v) {
                for (int64_t i = 0; i < v[0].numel(); ++i)
                  v[2][i] = alpha * v[0][i] + beta * v[1][i];
              }};
}

Case ScaleCase(std::string name, Arg x, Arg out) {
  return {.name = "Scale/" + name,
          .args = {x, out},
          .kernel = [](const Stream& s, const Views& v) { Scale(s, v[1], v[0], -1.75); },
          .reference =
              [](Arrays& v) {
                for (int64_t i = 0; i < v[0].numel(); ++i) v[1][i] = -1.75 * v[0][i];
              }};
}

Case MultiplyCase(std::string name, Arg a, Arg b, Arg out) {
  return {.name = "Multiply/" + name,
          .args = {a, b, out},
          .kernel = [](const Stream& s, const Views& v) { Multiply(s, v[2], v[0], v[1]); },
          .reference =
              [](Arrays& v) {
                for (int64_t i = 0; i < v[0].numel(); ++i) v[2][i] = v[0][i] * v[1][i];
              }};
}

Case AddBiasCase(std::string name, Arg x, Arg bias, Arg out) {
  return {.name = "AddBias/" + name,
          .args = {x, bias, out},
          .kernel = [](const Stream& s, const Views& v) { AddBias(s, v[2], v[0], v[1]); },
          .reference =
              [](Arrays& v) {
                for (int64_t i = 0; i < v[0].numel(); ++i)
                  v[2][i] = v[0][i] + v[1][i % v[1].numel()];
              }};
}

Case SwiGluCase(std::string name, Arg gate, Arg up, Arg out) {
  return {.name = "SwiGlu/" + name,
          .args = {gate, up, out},
          .kernel = [](const Stream& s, const Views& v) { SwiGlu(s, v[2], v[0], v[1]); },
          .reference =
              [](Arrays& v) {
                for (int64_t i = 0; i < v[0].numel(); ++i)
                  v[2][i] = SiluReference(v[0][i]) * v[1][i];
              }};
}

Case SwiGluBackwardCase(std::string name, Arg dy, Arg gate, Arg up, Arg dgate, Arg dup) {
  return {.name = "SwiGluBackward/" + name,
          .args = {dy, gate, up, dgate, dup},
          .kernel = [](const Stream& s,
                       const Views& v) { SwiGluBackward(s, v[3], v[4], v[0], v[1], v[2]); },
          .reference =
              [](Arrays& v) {
                for (int64_t i = 0; i < v[0].numel(); ++i) {
                  v[3][i] = v[0][i] * v[2][i] * SiluSlopeReference(v[1][i]);
                  v[4][i] = v[0][i] * SiluReference(v[1][i]);
                }
              },
          .gradient = {[](const Arrays& v) {
                         double sum = 0;
                         for (int64_t i = 0; i < v[0].numel(); ++i)
                           sum += v[0][i] * SiluReference(v[1][i]) * v[2][i];
                         return sum;
                       },
                       {{3, 1}, {4, 2}}}};
}

// Calls f(name, shape, first output, second output, timed?): a case per size, and the sizes again
// with outputs that alias argument 0 and 1.
template <class F>
void ForShapes(DType t, F f) {
  for (const Dims& shape : {Dims{0}, Dims{1}, Dims{3}, Dims{65}, Dims{5, 768}, Dims{97, 1031}})
    f(fmt::format("{}/{}", Name(t), shape.ToString()), shape, Out(t, shape), Out(t, shape), false);
  for (const Dims& shape : {Dims{67}, Dims{70, 512}})
    f(fmt::format("{}/{}/aliased", Name(t), shape.ToString()), shape, Out(t, shape).Aliasing(0),
      Out(t, shape).Aliasing(1), false);
  const Dims large{2048, 4096};
  if (t != DType::kF64)
    f(fmt::format("bench/{}", Name(t)), large, Out(t, large), Out(t, large), true);
}

const CaseFile kCases([](std::vector<Case>& cases) {
  const auto add = [&](Case c, bool timed) {
    c.benchmark = timed;
    c.test = !timed;
    cases.push_back(std::move(c));
  };
  const std::vector<double> special = {0,    -0.0,  1e-30, -1e-30, 12,  -12,          30,   -30,
                                       88,   -88,   95,    -95,    710, -710,         1e6,  -1e6,
                                       1e15, -1e15, 3e38,  -3e38,  0.5, std::nan(""), 1e-8, -3};
  for (DType t : kFloats) {
    ForShapes(t, [&](const std::string& name, Dims shape, Arg out, Arg out2, bool timed) {
      const Arg wide = In(t, shape).Range(-12, 12), x = In(t, shape);
      add(UnaryCase("Gelu/" + name, Gelu, GeluReference, out, wide), timed);
      add(UnaryCase("Silu/" + name, Silu, SiluReference, out, wide), timed);
      add(BackwardCase("GeluBackward/" + name, GeluBackward, GeluReference, GeluSlopeReference, out,
                       x, In(t, shape).Range(-5, 5)),
          timed);
      add(BackwardCase("SiluBackward/" + name, SiluBackward, SiluReference, SiluSlopeReference, out,
                       x, wide),
          timed);
      add(AddCase(name, x, x, out, 1, 1), timed);
      add(ScaleCase(name, x, out), timed);
      add(MultiplyCase(name, x, x, out), timed);
      add(SwiGluCase(name, wide, x, out), timed);
      if (shape.rank() == 2) add(AddBiasCase(name, x, In(t, {shape[1]}), out), timed);
      if (out.alias >= 0) {  // dgate and dup over gate and up
        out.alias = 1;
        out2.alias = 2;
      }
      add(SwiGluBackwardCase(name, x, wide, x, out, out2), timed);
    });
    // Outputs over the second argument.
    const std::string name = fmt::format("{}/second", Name(t));
    const Arg x = In(t, {67}), out = Out(t, {67}).Aliasing(1);
    add(AddCase(name, x, x, out, 0.5, -2), false);
    add(MultiplyCase(name, x, x, out), false);
    add(BackwardCase("GeluBackward/" + name, GeluBackward, GeluReference, GeluSlopeReference, out,
                     x, x),
        false);
    add(SwiGluCase(name, x, x, out), false);
    add(AddBiasCase(fmt::format("{}/column", Name(t)), In(t, {7, 1}), In(t, {1}), Out(t, {7, 1})),
        false);
    // bf16 gradients into f32 sums, and every other mixture.
    for (DType u : kFloats)
      for (DType o : kFloats)
        add(AddCase(fmt::format("{}_{}_{}", Name(t), Name(u), Name(o)), In(t, {3, 67}),
                    In(u, {3, 67}), Out(o, {3, 67}), 0.25, 3),
            false);
  }
  // In f32 the derivative's reference, in double, is 0 where ours is a few 1e-38.
  for (DType t : {DType::kF64, DType::kF32}) {
    const Arg x = In(t, {24}).Values(special), one = In(t, {24}).Values({1}), out = Out(t, {24});
    const std::string name = fmt::format("special/{}", Name(t));
    const auto finite = [&](Case c) {  // else the reference itself is inf - inf
      c.reference = [r = c.reference](Arrays& a) {
        r(a);
        const size_t last = a.size() - 1;
        for (int64_t i = 0; i < a[0].numel(); ++i) {
          const double v = a[a.size() == 2 ? 0 : 1][i];
          if (std::abs(v) > 100 && !std::isnan(v))
            a[last][i] = a.size() == 2 ? std::max(v, 0.0) : (v > 0);
        }
      };
      add(c, false);
    };
    finite(UnaryCase("Gelu/" + name, Gelu, GeluReference, out, x));
    finite(UnaryCase("Silu/" + name, Silu, SiluReference, out, x));
    finite(BackwardCase("GeluBackward/" + name, GeluBackward, GeluReference, GeluSlopeReference,
                        out, one, x));
    finite(BackwardCase("SiluBackward/" + name, SiluBackward, SiluReference, SiluSlopeReference,
                        out, one, x));
    for (size_t i = cases.size() - 2; i < cases.size(); ++i) cases[i].gradient = {};
  }
  add(AddCase("bench/f32_bf16_f32", InOut(DType::kF32, {1 << 23}), In(DType::kBF16, {1 << 23}),
              Out(DType::kF32, {1 << 23}).Aliasing(0), 1, 1),
      true);
});

}  // namespace
}  // namespace shoal::kernels::testing
