// How far the vector functions are from the true values, over their whole range.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels/elementwise.h"
#include "kernels/softmax.h"

namespace shoal::kernels {
namespace {

class NoScratch : public ScratchSource {
 public:
  void* AllocateScratch(size_t) override { return nullptr; }
  void FreeScratch(void*) override {}
};

// The largest error of `kernel` against f in units of the last place of f, over n values in
// [low, high].
template <class T, class Kernel, class F>
double WorstUlps(Kernel kernel, F f, double low, double high, int n = 200001) {
  std::vector<T> x(n), out(n);
  for (int i = 0; i < n; ++i) x[i] = static_cast<T>(low + (high - low) * i / (n - 1));
  NoScratch scratch;
  const Stream stream{{}, nullptr, &scratch};
  kernel(stream, View(out.data(), DTypeOf<T>::value, {n}), View(x.data(), DTypeOf<T>::value, {n}));
  double worst = 0;
  for (int i = 0; i < n; ++i) {
    const long double want = f(static_cast<long double>(x[i]));
    const T near = static_cast<T>(std::abs(want));
    if (near < std::numeric_limits<T>::min()) continue;
    const T ulp = std::nextafter(near, std::numeric_limits<T>::infinity()) - near;
    const auto off = static_cast<double>(std::abs(out[i] - want) / ulp);
    worst = std::isnan(off) ? HUGE_VAL : std::max(worst, off);
  }
  return worst;
}

long double SiluExact(long double x) { return x / (1 + std::exp(-x)); }

TEST(Accuracy, SiluIsWithinFewUlps) {
  const auto silu = [](const Stream& s, const View& out, const View& x) { Silu(s, out, x); };
  for (double width : {1e-3, 1.0, 20.0, 86.0}) {
    EXPECT_LE(WorstUlps<float>(silu, SiluExact, -width, width), 3) << width;
    EXPECT_LE(WorstUlps<double>(silu, SiluExact, -width, width), 4) << width;
  }
  EXPECT_LE(WorstUlps<double>(silu, SiluExact, -690, 690), 4);
}

// exp(x - x0) out of a softmax over {x0, x}: their ratio, where x0 is the larger.
TEST(Accuracy, SoftmaxKeepsSmallProbabilities) {
  const auto ratio = [](const Stream& stream, const View& out, const View& x) {
    VisitFloat(x.dtype, "test", [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (!std::is_same_v<T, BF16>) {
        const int64_t n = x.numel();
        std::vector<T> pairs(2 * n, T(0));
        for (int64_t i = 0; i < n; ++i) pairs[2 * i + 1] = x.as<T>()[i];
        const View v(pairs.data(), x.dtype, {n, 2});
        Softmax(stream, v, v);
        for (int64_t i = 0; i < n; ++i) out.as<T>()[i] = pairs[2 * i + 1] / pairs[2 * i];
      }
    });
  };
  const auto exact = [](long double x) { return std::exp(x); };
  EXPECT_LE(WorstUlps<float>(ratio, exact, -86, 0), 4);
  EXPECT_LE(WorstUlps<double>(ratio, exact, -690, 0), 4);
}

}  // namespace
}  // namespace shoal::kernels
