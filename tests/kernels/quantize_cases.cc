#include <cmath>
#include <limits>

#include "kernels/quantize.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

// The definition. With `x` as it is stored: codes are exact.
void QuantizeReference(Arrays& a) {
  const Array& x = a[2];
  const int64_t n = x.dim(1);
  for (int64_t row = 0; row < x.dim(0); ++row) {
    for (int64_t block = 0; block < QuantizeBlocks(n); ++block) {
      const int64_t begin = block * kQuantizeBlock, end = std::min(n, begin + kQuantizeBlock);
      double most = 0;
      bool finite = true;
      for (int64_t i = begin; i < end; ++i) {
        finite = finite && std::abs(x(row, i)) <= kQuantizeLargest;
        most = std::max(most, std::abs(x(row, i)));
      }
      const bool zeros = !finite || most < kQuantizeSmallest;
      for (int64_t i = begin; i < end; ++i)
        a[0](row, i) = zeros ? 0 : std::nearbyint(x(row, i) * 127 / most);
      a[1](row, block) = !finite ? std::numeric_limits<double>::quiet_NaN()
                         : zeros ? 0
                                 : most / 127;
    }
  }
}

Case QuantizeCase(const std::string& name, DType t, int64_t m, int64_t n, const Arg& x) {
  return {.name = fmt::format("Quantize/{}/{}x{}{}", Name(t), m, n, name),
          .args = {Out(DType::kI8, {m, n}), Out(DType::kF32, {m, QuantizeBlocks(n)}), x},
          .kernel = [](const Stream& s, const Views& a) { Quantize(s, a[0], a[1], a[2]); },
          .reference = QuantizeReference};
}

const CaseFile kCases([](std::vector<Case>& cases) {
  struct Size {
    int64_t m, n;
  };
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (DType t : kFloats) {
    for (auto [m, n] :
         {Size{0, 5}, {1, 1}, {7, 1}, {5, 3}, {3, 64}, {9, 65}, {4, 770}, {70, 515}}) {
      cases.push_back(QuantizeCase("", t, m, n, In(t, {m, n}).Range(-3, 3)));
      cases.push_back(
          {.name = fmt::format("Dequantize/{}/{}x{}", Name(t), m, n),
           .args = {Out(t, {m, n}), In(DType::kI8, {m, n}).Range(-127, 127),
                    In(DType::kF32, {m, QuantizeBlocks(n)})},
           .kernel = [](const Stream& s, const Views& a) { Dequantize(s, a[0], a[1], a[2]); },
           .reference =
               [n = n](Arrays& a) {
                 for (int64_t i = 0; i < a[0].numel(); ++i)
                   a[0][i] = a[1][i] * a[2](i / n, i % n / kQuantizeBlock);
               },
           .tolerance = {.f64 = 1e-15, .f32 = 1e-7, .bf16 = 4e-3}});
    }
    // Halves between two levels, whole blocks of zeros, and what is too small, too large or no
    // number.
    cases.push_back(QuantizeCase("/ties", t, 2, 64,
                                 In(t, {2, 64}).Values({127, 0.5, 1.5, -0.5, -2.5, 63.5, -126.5})));
    cases.push_back(QuantizeCase("/zero", t, 2, 66, In(t, {2, 66}).Values({0, -0.0})));
    cases.push_back(
        QuantizeCase("/small", t, 1, 130, In(t, {1, 130}).Values({0x1p-119, -0x1p-121, 0x1p-126})));
    cases.push_back(QuantizeCase("/tiny", t, 1, 70, In(t, {1, 70}).Values({0x1p-120, -0x1p-126})));
    cases.push_back(QuantizeCase("/large", t, 1, 70, In(t, {1, 70}).Values({0x1p119, -0x1p118})));
    cases.push_back(QuantizeCase("/larger", t, 1, 70, In(t, {1, 70}).Values({0x1p120, 1})));
    cases.push_back(QuantizeCase("/inf", t, 1, 70, In(t, {1, 70}).Values({1, -kInf, 2})));
    cases.push_back(QuantizeCase(
        "/nan", t, 3, 67,
        In(t, {3, 67}).Values({1, std::numeric_limits<double>::quiet_NaN(), 2, 3, 4, 5, 6})));
    if (t == DType::kF64) continue;
    for (const bool forth : {true, false}) {
      Case bench = QuantizeCase("", t, 4096, 768, In(t, {4096, 768}));
      bench.name = fmt::format("{}/bench/{}", forth ? "Quantize" : "Dequantize", Name(t));
      if (!forth) {
        bench.args = {Out(t, {4096, 768}), In(DType::kI8, {4096, 768}).Range(-127, 127),
                      In(DType::kF32, {4096, 12})};
        bench.kernel = [](const Stream& s, const Views& a) { Dequantize(s, a[0], a[1], a[2]); };
      }
      bench.benchmark = true;
      bench.test = false;
      cases.push_back(std::move(bench));
    }
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
