#include <cmath>
#include <limits>

#include "kernels/copy.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

constexpr DType kAll[] = {DType::kF64, DType::kF32, DType::kBF16, DType::kF16, DType::kI32,
                          DType::kI64, DType::kI8,  DType::kU8,   DType::kI16};

Case CopyCase(std::string name, Arg out, Arg x) {
  return {.name = "Copy/" + name,
          .args = {out, x},
          .kernel = [](const Stream& s, const Views& a) { Copy(s, a[0], a[1]); },
          .reference = [](Arrays& a) { a[0].v = a[1].v; },
          .tolerance = {0, 0, 0}};
}

Case FillCase(std::string name, Arg out, double value) {
  return {.name = "Fill/" + name,
          .args = {out},
          .kernel = [value](const Stream& s, const Views& a) { Fill(s, a[0], value); },
          .reference = [value](Arrays& a) { a[0].v.assign(a[0].numel(), value); },
          .tolerance = {0, 0, 0}};
}

const CaseFile kCases([](std::vector<Case>& cases) {
  for (DType to : kAll) {
    for (DType from : kAll) {
      const auto name = fmt::format("{}_from_{}", Name(to), Name(from));
      const Arg x = In(from, {3, 37}).Range(0, 100);
      cases.push_back(CopyCase(name, Out(to, {3, 37}), x));
      cases.push_back(CopyCase(name + "/strided", Out(to, {3, 37}).Strided({41, 1}),
                               x.Strided(TransposedStrides({3, 37}))));
    }
    cases.push_back(FillCase(fmt::format("{}", Name(to)), Out(to, {5, 13}), 3));
    cases.push_back(FillCase(fmt::format("{}/strided", Name(to)),
                             Out(to, {2, 5, 13}).Strided(TransposedStrides({2, 5, 13})), 1));
  }
  const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
  const std::vector<double> special = {0,          -0.0,   inf,   -inf,   nan,
                                       1e-42,      3e38,   1e300, 1e-300, 1.00390625,
                                       1.01171875, -65504, 65520, 6.1e-5, 5.9e-8};
  for (DType to : kFloats)
    for (DType from : kFloats)
      cases.push_back(CopyCase(fmt::format("special/{}_from_{}", Name(to), Name(from)),
                               Out(to, {45}), In(from, {45}).Values(special)));
  for (DType t : kFloats) {
    const char* n = Name(t);
    const DType other = t == DType::kF32 ? DType::kBF16 : DType::kF32;
    cases.push_back(CopyCase(fmt::format("empty/{}", n), Out(t, {0, 3}), In(t, {0, 3})));
    cases.push_back(CopyCase(fmt::format("scalar/{}", n), Out(t, {}), In(other, {})));
    cases.push_back(
        CopyCase(fmt::format("column/{}", n), Out(t, {70, 1}).Strided({5, 3}), In(other, {70, 1})));
    cases.push_back(CopyCase(fmt::format("repeated_row/{}", n), Out(t, {9, 65}),
                             In(t, {9, 65}).Strided({0, 1})));
    cases.push_back(CopyCase(fmt::format("repeated_column/{}", n), Out(t, {9, 65}),
                             In(other, {9, 65}).Strided({1, 0})));
    // Above the threshold for threads.
    cases.push_back(CopyCase(fmt::format("large/{}", n), Out(t, {70001}), In(other, {70001})));
    cases.push_back(CopyCase(fmt::format("large_transposed/{}", n), Out(t, {301, 257}),
                             In(other, {301, 257}).Strided(TransposedStrides({301, 257}))));
    // Heads out of a packed projection [B, T, 3, N, H], as [B, N, T, H] and the other way about.
    cases.push_back(CopyCase(fmt::format("heads/{}", n), Out(t, {2, 5, 33, 64}),
                             In(t, {2, 5, 33, 64}).Strided({33 * 960, 64, 960, 1})));
    cases.push_back(CopyCase(fmt::format("tokens/{}", n),
                             Out(t, {2, 33, 5, 64}).Strided({5 * 33 * 64, 64, 33 * 64, 1}),
                             In(t, {2, 33, 5, 64})));
  }
  for (auto [to, from] : {std::pair{DType::kF32, DType::kF32},
                          {DType::kBF16, DType::kF32},
                          {DType::kF32, DType::kBF16}}) {
    const auto name = fmt::format("{}_from_{}", Name(to), Name(from));
    cases.push_back(CopyCase("bench/" + name, Out(to, {1 << 25}), In(from, {1 << 25})));
    cases.back().benchmark = true;
    cases.back().test = false;
    cases.push_back(CopyCase("bench_transposed/" + name, Out(to, {4096, 3072}),
                             In(from, {4096, 3072}).Strided(TransposedStrides({4096, 3072}))));
    cases.back().benchmark = true;
    cases.back().test = false;
  }
  cases.push_back(FillCase("bench/f32", Out(DType::kF32, {1 << 25}), 1));
  cases.back().benchmark = true;
  cases.back().test = false;
});

}  // namespace
}  // namespace shoal::kernels::testing
