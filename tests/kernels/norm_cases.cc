#include "kernels/norm.h"
#include "tests/kernels/harness.h"
#include "tests/kernels/reference/norm.h"

namespace shoal::kernels::testing {
namespace {

constexpr double kEps = 1e-5;
// Sums of n f32 terms in an order of their own.
constexpr Tolerance kRowSums = {1e-12, 4e-6, 4.5e-3};

Case RmsNormCase(std::string name, DType t, int64_t m, int64_t n, double size = 2) {
  return {
      .name = "RmsNorm/" + name,
      .args = {Out(t, {m, n}), Out(AccumulatorDType(t), {m}), In(t, {m, n}).Range(-size, size),
               In(t, {n})},
      .kernel = [](const Stream& s, const Views& a) { RmsNorm(s, a[0], a[1], a[2], a[3], kEps); },
      .reference =
          [](Arrays& a) {
            for (int64_t i = 0; i < a[2].dim(0); ++i) {
              const RowStatistics s = StatisticsOf(a[2], i, false, kEps);
              a[1][i] = s.rstd;
              for (int64_t j = 0; j < a[2].dim(1); ++j)
                a[0](i, j) = NormReference(a[2], i, j, s, a[3], nullptr);
            }
          },
      .tolerance = kRowSums};
}

Case LayerNormCase(std::string name, DType t, int64_t m, int64_t n, double center = 0.5) {
  const DType stats = AccumulatorDType(t);
  return {.name = "LayerNorm/" + name,
          .args = {Out(t, {m, n}), Out(stats, {m}), Out(stats, {m}),
                   In(t, {m, n}).Range(center - 2, center + 2), In(t, {n}), In(t, {n})},
          .kernel = [](const Stream& s,
                       const Views& a) { LayerNorm(s, a[0], a[1], a[2], a[3], a[4], a[5], kEps); },
          .reference =
              [](Arrays& a) {
                for (int64_t i = 0; i < a[3].dim(0); ++i) {
                  const RowStatistics s = StatisticsOf(a[3], i, true, kEps);
                  a[1][i] = s.mean;
                  a[2][i] = s.rstd;
                  for (int64_t j = 0; j < a[3].dim(1); ++j)
                    a[0](i, j) = NormReference(a[3], i, j, s, a[4], &a[5]);
                }
              },
          .tolerance = kRowSums};
}

struct BackwardOptions {
  bool add_dx = false, add_dw = false, alias = false;
  DType dw = DType::kF32;
};

// Arguments: dy, x, weight, mean, rstd, dx, dweight, dbias; RMSNorm has no mean and no dbias.
Case BackwardCase(std::string name, bool centered, DType t, int64_t m, int64_t n,
                  BackwardOptions o) {
  const DType stats = AccumulatorDType(t);
  Arg dx = o.add_dx ? InOut(t, {m, n}) : Out(t, {m, n});
  if (o.alias) dx.alias = 0;
  const Arg dw = o.add_dw ? InOut(o.dw, {n}) : Out(o.dw, {n});
  return {.name = (centered ? "LayerNormBackward/" : "RmsNormBackward/") + name,
          .args = {In(t, {m, n}), In(t, {m, n}).Range(-1.5, 2), In(t, {n}),
                   centered ? In(stats, {m}) : Absent(), In(stats, {m}), dx, dw,
                   centered ? dw : Absent()},
          .kernel =
              [=](const Stream& s, const Views& a) {
                if (centered) {
                  LayerNormBackward(s, a[5], o.add_dx, a[6], a[7], o.add_dw, a[0], a[1], a[2], a[3],
                                    a[4]);
                } else {
                  RmsNormBackward(s, a[5], o.add_dx, a[6], o.add_dw, a[0], a[1], a[2], a[4]);
                }
              },
          .reference =
              [=](Arrays& a) {
                if (!o.add_dx) a[5].v.assign(a[5].numel(), 0);
                if (!o.add_dw)
                  for (int i : {6, 7}) a[i].v.assign(a[i].numel(), 0);
                NormBackwardReference(a[5], a[6], centered ? &a[7] : nullptr, a[0], a[1], a[2],
                                      centered, kEps);
              },
          .prepare =
              [=](Arrays& a) {
                for (int64_t i = 0; i < m; ++i) {
                  const RowStatistics s = StatisticsOf(a[1], i, centered, kEps);
                  if (centered) a[3][i] = s.mean;
                  a[4][i] = s.rstd;
                }
              },
          .gradient = {[=](const Arrays& a) {
                         double sum = 0;
                         for (int64_t i = 0; i < m; ++i) {
                           const RowStatistics s = StatisticsOf(a[1], i, centered, kEps);
                           for (int64_t j = 0; j < n; ++j)
                             sum += a[0](i, j) * NormReference(a[1], i, j, s, a[2], nullptr);
                         }
                         return sum;
                       },
                       {{5, 1}, {6, 2}}},
          // A row of one element cancels to eps.
          .tolerance = {n == 1 ? 1e-9 : 1e-11, n == 1 ? 1e-2 : 1e-5, n == 1 ? 1e-2 : 4.5e-3}};
}

const CaseFile kCases([](std::vector<Case>& cases) {
  constexpr std::pair<int64_t, int64_t> kShapes[] = {{0, 5},  {1, 1},   {3, 1},     {1, 3},
                                                     {5, 65}, {2, 768}, {37, 1000}, {130, 771}};
  for (DType t : kFloats) {
    for (auto [m, n] : kShapes) {
      const auto name = fmt::format("{}/{}x{}", Name(t), m, n);
      cases.push_back(RmsNormCase(name, t, m, n));
      cases.push_back(LayerNormCase(name, t, m, n));
      // One element has no variance: LayerNorm's output is its bias and its gradient cancels.
      for (bool centered : {false, true})
        if (!(centered && n == 1))
          cases.push_back(BackwardCase(name, centered, t, m, n, {.dw = AccumulatorDType(t)}));
    }
    cases.push_back(RmsNormCase(fmt::format("{}/zero", Name(t)), t, 2, 65, 0));
    cases.push_back(RmsNormCase(fmt::format("{}/large", Name(t)), t, 2, 65, 1e8));
    if (t != DType::kBF16)  // the mean is far larger than the spread
      cases.push_back(LayerNormCase(fmt::format("{}/off_center", Name(t)), t, 3, 768, 64)),
          cases.back().tolerance.f32 = 3e-5;
    for (bool centered : {false, true})
      for (int flags = 1; flags < 8; ++flags) {
        BackwardOptions o{(flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0,
                          (flags & 2) ? t : AccumulatorDType(t)};
        if (o.alias && o.add_dx) continue;
        cases.push_back(BackwardCase(
            fmt::format("{}/add_dx{}_add_dw{}_alias{}", Name(t), o.add_dx, o.add_dw, o.alias),
            centered, t, 33, 67, o));
      }
    if (t == DType::kF64) continue;
    const auto name = fmt::format("bench/{}", Name(t));
    for (Case c : {RmsNormCase(name, t, 4096, 768), LayerNormCase(name, t, 4096, 768),
                   BackwardCase(name, false, t, 4096, 768, {.add_dx = true, .add_dw = true}),
                   BackwardCase(name, true, t, 4096, 768, {.add_dx = true, .add_dw = true})}) {
      c.benchmark = true;
      c.test = false;
      cases.push_back(c);
    }
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
