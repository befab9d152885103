#include "kernels/dropout.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

constexpr PhiloxKey kKey{0x123456789abcdef0, 0xfedcba9876543210};

Case DropoutCase(std::string name, DType t, int64_t m, int64_t d, double p, Arg tokens,
                 bool alias) {
  return {
      .name = "Dropout/" + name,
      .args = {In(t, {m, d}), tokens, Out(t, {m, d}).Aliasing(alias ? 0 : -1)},
      .kernel = [=](const Stream& s, const Views& a) { Dropout(s, a[2], a[0], a[1], p, kKey); },
      .reference =
          [=](Arrays& a) {
            for (int64_t i = 0; i < m; ++i)
              for (int64_t j = 0; j < d; ++j) {
                const auto index = static_cast<uint64_t>(a[1][i]) * static_cast<uint64_t>(d) + j;
                const bool keep = UniformFromWord(PhiloxWord(kKey, index)) >= p;
                a[2](i, j) = keep ? a[0](i, j) / (1 - p) : 0;
              }
          },
      // The mask is fixed, so that dropout is linear and its own gradient.
      .gradient = {[=](const Arrays& a) {
                     double sum = 0;
                     for (int64_t i = 0; i < a[0].numel(); ++i) {
                       const auto index =
                           static_cast<uint64_t>(a[1][i / d]) * static_cast<uint64_t>(d) + i % d;
                       const bool keep = UniformFromWord(PhiloxWord(kKey, index)) >= p;
                       sum += a[0][i] * a[0][i] / 2 * (keep ? 1 / (1 - p) : 0);
                     }
                     return sum;
                   },
                   {{2, 0}}}};
}

const CaseFile kCases([](std::vector<Case>& cases) {
  struct Size {
    int64_t m, d;
  };
  for (DType t : kFloats) {
    for (auto [m, d] : {Size{0, 5}, {1, 1}, {7, 1}, {5, 3}, {9, 65}, {4, 768}, {50, 771}}) {
      const Arg tokens = In(DType::kI64, {m}).Range(0, 1e6);
      const auto name = fmt::format("{}/{}x{}", Name(t), m, d);
      cases.push_back(DropoutCase(name, t, m, d, 0.1, tokens, false));
      cases.push_back(DropoutCase(name + "/aliased", t, m, d, 0.5, tokens, true));
    }
    // Counters past 2^32, and the ends of p.
    cases.push_back(DropoutCase(fmt::format("{}/far", Name(t)), t, 3, 66, 0.3,
                                In(DType::kI64, {3}).Values({0x3fffffff, 1e12, 9e15}), false));
    for (double p : {0.0, 0x1p-24, 0.999})
      cases.push_back(DropoutCase(fmt::format("{}/p{}", Name(t), p), t, 3, 500, p,
                                  In(DType::kI64, {3}).Range(0, 99), false));
    if (t == DType::kF64) continue;
    cases.push_back(DropoutCase(fmt::format("bench/{}", Name(t)), t, 4096, 768, 0.1,
                                In(DType::kI64, {4096}).Range(0, 1e6), false));
    cases.back().benchmark = true;
    cases.back().test = false;
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
