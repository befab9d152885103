#include <cmath>

#include "kernels/rope.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

constexpr double kTheta = 10000;

void RopeReference(Array& out, const Array& x, const Array& positions, bool inverse) {
  const int64_t width = x.dim(3), half = width / 2;
  for (int64_t b = 0; b < x.dim(0); ++b)
    for (int64_t t = 0; t < x.dim(1); ++t)
      for (int64_t n = 0; n < x.dim(2); ++n)
        for (int64_t i = 0; i < half; ++i) {
          const double angle = (inverse ? -1 : 1) * positions(b, t) *
                               std::pow(kTheta, -2.0 * i / static_cast<double>(width));
          const double u = x(b, t, n, i), v = x(b, t, n, i + half);
          out(b, t, n, i) = u * std::cos(angle) - v * std::sin(angle);
          out(b, t, n, i + half) = v * std::cos(angle) + u * std::sin(angle);
        }
}

// With `inverse`, x is the gradient of the output and out that of the input: also checked as the
// gradient of the forward, at an argument of its own.
Case RopeCase(std::string name, Arg x, Arg out, Arg positions, bool inverse) {
  Case c{.name = "Rope/" + name,
         .args = {x, positions, out, In(x.dtype, x.shape)},
         .kernel = [=](const Stream& s,
                       const Views& a) { Rope(s, a[2], a[0], a[1], kTheta, inverse); },
         .reference = [=](Arrays& a) { RopeReference(a[2], a[0], a[1], inverse); },
         .tolerance = {1e-11, 2e-6, 4.5e-3}};
  if (inverse)
    c.gradient = {[](const Arrays& a) {
                    Array y = a[3];
                    RopeReference(y, a[3], a[1], false);
                    double sum = 0;
                    for (int64_t i = 0; i < y.numel(); ++i) sum += a[0][i] * y[i];
                    return sum;
                  },
                  {{2, 3}}};
  return c;
}

const CaseFile kCases([](std::vector<Case>& cases) {
  for (DType t : kFloats) {
    for (const Dims& shape : {Dims{0, 3, 2, 4}, Dims{1, 1, 1, 2}, Dims{2, 3, 1, 6},
                              Dims{2, 5, 3, 64}, Dims{1, 3, 2, 130}, Dims{2, 65, 12, 64}})
      for (bool inverse : {false, true})
        cases.push_back(RopeCase(
            fmt::format("{}/{}/inverse_{}", Name(t), shape.ToString(), inverse), In(t, shape),
            Out(t, shape), In(DType::kI32, {shape[0], shape[1]}).Range(0, 2047), inverse));
    const auto name = [t](const char* what) { return fmt::format("{}/{}", Name(t), what); };
    const Dims shape{3, 7, 4, 32};
    const Arg far = In(DType::kI32, {3, 7}).Range(1e5, 1e6);
    const Arg shared = In(DType::kI32, {3, 7}).Values({0, 1, 2, 3, 4, 5, 6});
    cases.push_back(RopeCase(name("far"), In(t, shape), Out(t, shape), far, false));
    cases.back().tolerance.f64 = 1e-9;  // of the reference's own angles
    cases.push_back(
        RopeCase(name("aliased"), In(t, shape), Out(t, shape).Aliasing(0), shared, false));
    // q inside a packed projection [B, T, 3 N H], and heads-first [B, N, T, H].
    cases.push_back(RopeCase(name("packed"), In(t, shape).Strided(PaddedStrides(shape, 8, 2)),
                             Out(t, shape).Strided(PaddedStrides(shape, 1, 2)), shared, false));
    cases.push_back(RopeCase(name("heads_first"), In(t, shape).Strided({4 * 7 * 32, 32, 7 * 32, 1}),
                             Out(t, shape).Strided(PaddedStrides(shape, 3)), shared, true));
    if (t == DType::kF64) continue;
    const Dims large{4, 1024, 12, 64};
    std::vector<double> range(1024);
    for (int i = 0; i < 1024; ++i) range[i] = i;
    cases.push_back(RopeCase(name("bench"), InOut(t, large), Out(t, large).Aliasing(0),
                             In(DType::kI32, {4, 1024}).Values(range), false));
    cases.back().args.pop_back();
    cases.back().args[2].role = Role::kInOut;
    cases.back().args[0].role = Role::kIn;
    cases.back().bytes = 2.0 * large.numel() * SizeOf(t);
    cases.back().benchmark = true;
    cases.back().test = false;
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
