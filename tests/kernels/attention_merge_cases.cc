#include <cmath>
#include <limits>

#include "kernels/attention.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

struct Shape {
  int64_t batch, tokens, heads, head_dim;
};

// out(b, t, n, .) of an array with those dimensions.
double* Row(Array& x, int64_t b, int64_t t, int64_t n) {
  return &x.v[((b * x.dim(1) + t) * x.dim(2) + n) * x.dim(3)];
}

// The definition: both sides' exponentials are taken relative to the larger lse.
void Merge(Arrays& a) {
  Array &out = a[0], &lse = a[1], &part = a[2], &lse_part = a[3];
  for (int64_t b = 0; b < out.dim(0); ++b)
    for (int64_t t = 0; t < out.dim(1); ++t)
      for (int64_t n = 0; n < out.dim(2); ++n) {
        const double x = lse(b, n, t), y = lse_part(b, n, t), top = std::max(x, y);
        if (top == kNothing) continue;
        const double sum = std::exp(x - top) + std::exp(y - top);
        double *to = Row(out, b, t, n), *from = Row(part, b, t, n);
        for (int64_t h = 0; h < out.dim(3); ++h)
          to[h] = std::exp(x - top) / sum * to[h] + std::exp(y - top) / sum * from[h];
        lse(b, n, t) = top + std::log(sum);
      }
}

Case MergeCase(DType t, const Shape& s, const std::string& name, double range, bool exact) {
  const DType wide = AccumulatorDType(t);
  const Dims rows{s.batch, s.tokens, s.heads, s.head_dim};
  const Dims statistics{s.batch, s.heads, s.tokens};
  Case c{.name = fmt::format("MergeAttention/{}/{}", Name(t), name)};
  c.args = {InOut(wide, rows), InOut(wide, statistics).Range(-range, range), In(t, rows),
            In(wide, statistics).Range(-range, range)};
  c.kernel = [](const Stream& stream, const Views& a) {
    MergeAttention(stream, a[0], a[1], a[2], a[3]);
  };
  c.reference = Merge;
  c.tolerance = exact ? Tolerance{0, 0, 0} : Tolerance{1e-13, 2e-6, 2e-6};
  return c;
}

const CaseFile kCases([](std::vector<Case>& cases) {
  for (DType t : kFloats) {
    const DType wide = AccumulatorDType(t);
    for (const Shape& s :
         {Shape{1, 1, 1, 1}, Shape{2, 5, 3, 7}, Shape{1, 33, 4, 64}, Shape{3, 1, 2, 80}})
      for (double range : {1.0, 30.0, 1e4}) {
        Case c = MergeCase(
            t, s, fmt::format("{}x{}x{}x{}/{}", s.batch, s.tokens, s.heads, s.head_dim, range),
            range, false);
        // f32 has 1e-3 between neighbours at 1e4, in the weights too.
        if (range > 1e3) c.tolerance.f32 = c.tolerance.bf16 = 2e-3, c.tolerance.f64 = 1e-11;
        cases.push_back(c);
      }
    const Shape s{2, 9, 3, 20};
    const Dims statistics{s.batch, s.heads, s.tokens};
    Case c = MergeCase(t, s, "nothing_yet", 1, true);
    c.args[1] = InOut(wide, statistics).Values({kNothing});
    cases.push_back(c);
    c = MergeCase(t, s, "nothing_more", 1, true);
    c.args[3] = In(wide, statistics).Values({kNothing});
    cases.push_back(c);
    c = MergeCase(t, s, "nothing_at_all", 1, true);
    c.args[1] = InOut(wide, statistics).Values({kNothing});
    c.args[3] = In(wide, statistics).Values({kNothing});
    cases.push_back(c);
    c = MergeCase(t, s, "strided", 1, false);
    for (int i : {0, 2}) c.args[i] = c.args[i].Strided({1000, 100, 27, 1});
    for (int i : {1, 3}) c.args[i] = c.args[i].Strided({200, 20, 1});
    cases.push_back(c);
    for (const Shape& d : {Shape{2, 5, 3, 7}, Shape{1, 33, 4, 64}, Shape{0, 3, 2, 4}}) {
      const Dims rows{d.batch, d.tokens, d.heads, d.head_dim};
      const Dims strides{d.tokens * 1000, 1000, 100, 1};
      Case delta{.name = fmt::format("AttentionDelta/{}/{}x{}x{}x{}", Name(t), d.batch, d.tokens,
                                     d.heads, d.head_dim)};
      delta.args = {Out(wide, {d.batch, d.heads, d.tokens}), In(t, rows).Strided(strides),
                    In(t, rows)};
      delta.kernel = [](const Stream& stream, const Views& a) {
        AttentionDelta(stream, a[0], a[1], a[2]);
      };
      delta.reference = [](Arrays& a) {
        for (int64_t b = 0; b < a[1].dim(0); ++b)
          for (int64_t i = 0; i < a[1].dim(1); ++i)
            for (int64_t n = 0; n < a[1].dim(2); ++n) {
              const double *x = Row(a[1], b, i, n), *y = Row(a[2], b, i, n);
              double& sum = a[0](b, n, i) = 0;
              for (int64_t h = 0; h < a[1].dim(3); ++h) sum += x[h] * y[h];
            }
      };
      delta.tolerance = {1e-13, 2e-6, 2e-6};
      cases.push_back(delta);
    }
  }
});

}  // namespace
}  // namespace shoal::kernels::testing
