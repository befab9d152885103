#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/softmax.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

void SoftmaxReference(Array& out, const Array& x) {
  for (int64_t i = 0; i < x.dim(0); ++i) {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t j = 0; j < x.dim(1); ++j) top = std::max(top, x(i, j));
    for (int64_t j = 0; j < x.dim(1); ++j) sum += std::exp(x(i, j) - top);
    for (int64_t j = 0; j < x.dim(1); ++j) out(i, j) = std::exp(x(i, j) - top) / sum;
  }
}

Case SoftmaxCase(std::string name, Arg x, Arg out) {
  return {.name = "Softmax/" + name,
          .args = {x, out},
          .kernel = [](const Stream& s, const Views& a) { Softmax(s, a[1], a[0]); },
          .reference = [](Arrays& a) { SoftmaxReference(a[1], a[0]); },
          .tolerance = {1e-12, 2e-6, 4e-3}};
}

// Arguments: dy, x (of the forward, for the gradient only), out, dx.
Case BackwardCase(std::string name, DType t, Dims shape, bool alias) {
  return {.name = "SoftmaxBackward/" + name,
          .args = {In(t, shape), In(t, shape).Range(-4, 4), In(t, shape),
                   Out(t, shape).Aliasing(alias ? 0 : -1)},
          .kernel = [](const Stream& s, const Views& a) { SoftmaxBackward(s, a[3], a[0], a[2]); },
          .reference =
              [](Arrays& a) {
                for (int64_t i = 0; i < a[0].dim(0); ++i) {
                  double dot = 0;
                  for (int64_t j = 0; j < a[0].dim(1); ++j) dot += a[0](i, j) * a[2](i, j);
                  for (int64_t j = 0; j < a[0].dim(1); ++j)
                    a[3](i, j) = a[2](i, j) * (a[0](i, j) - dot);
                }
              },
          .prepare = [](Arrays& a) { SoftmaxReference(a[2], a[1]); },
          .gradient = {[](const Arrays& a) {
                         Array out = a[1];
                         SoftmaxReference(out, a[1]);
                         double sum = 0;
                         for (int64_t i = 0; i < out.numel(); ++i) sum += a[0][i] * out[i];
                         return sum;
                       },
                       {{3, 1}}},
          .tolerance = {1e-12, 4e-6, 4e-3}};
}

const CaseFile kCases([](std::vector<Case>& cases) {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
  for (DType t : kFloats) {
    for (const Dims& shape :
         {Dims{0, 4}, Dims{3, 0}, Dims{1, 1}, Dims{3, 2}, Dims{7, 65}, Dims{60, 771}}) {
      const auto name = fmt::format("{}/{}x{}", Name(t), shape[0], shape[1]);
      cases.push_back(SoftmaxCase(name, In(t, shape).Range(-20, 20), Out(t, shape)));
      if (shape[1] > 1) cases.push_back(BackwardCase(name, t, shape, false));
    }
    const auto n = [t](const char* what) { return fmt::format("{}/{}", Name(t), what); };
    const Dims shape{5, 67};
    cases.push_back(
        SoftmaxCase(n("aliased"), In(t, shape).Range(-20, 20), Out(t, shape).Aliasing(0)));
    cases.push_back(BackwardCase(n("aliased"), t, shape, true));
    cases.push_back(
        SoftmaxCase(n("huge"), In(t, {2, 67}).Values({1e30, 1e30, -1e30, -3e38}), Out(t, {2, 67})));
    cases.push_back(
        SoftmaxCase(n("masked"), In(t, {2, 67}).Values({-inf, 1, 2, -inf}), Out(t, {2, 67})));
    // 37 values shift from row to row of 37 + 1: NaN is seen in the body and in the tail.
    std::vector<double> row(37, 0.5);
    row[20] = nan;
    cases.push_back(SoftmaxCase(n("nan"), In(t, {38, 36}).Values(row), Out(t, {38, 36})));
    cases.push_back(SoftmaxCase(n("all_masked"), In(t, {1, 35}).Values({-inf}), Out(t, {1, 35})));
    if (t == DType::kF64) continue;
    for (Case c : {SoftmaxCase(n("bench"), In(t, {4096, 1024}), Out(t, {4096, 1024})),
                   BackwardCase(n("bench"), t, {4096, 1024}, false)}) {
      c.benchmark = true;
      c.test = false;
      cases.push_back(c);
    }
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
