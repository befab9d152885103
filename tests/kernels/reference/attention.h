// Attention in double, by its definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/attention.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {

// The number of sequence b's token 0.
inline int64_t Start(int64_t b) { return b % 2 == 0 ? 1000 * b + 3 : (int64_t{1} << 33) - 50; }

// What dropout multiplies the probability of query i and key j by.
inline double DropoutFactor(const AttentionDropout& o, int64_t b, int64_t n, int64_t i, int64_t j) {
  if (o.p == 0) return 1;
  const Philox4 head = Philox(o.key, o.first_head + n);
  const uint64_t seed = head.v[0] + (static_cast<uint64_t>(head.v[1]) << 32);
  const int64_t query = Start(b) + o.q_begin + i * o.q_step, key = o.k_begin + j * o.k_step;
  const Philox4 words = Philox({seed, static_cast<uint64_t>(key / 8)}, query);
  const uint32_t word = words.v[key % 8 / 2], half = key % 2 == 0 ? word & 0xffff : word >> 16;
  const double p = std::clamp(std::round(o.p * 65536), 1.0, 65535.0) / 65536;
  return half / 65536.0 >= p ? 1 / (1 - p) : 0;
}

// The definition, in double. probability(b, n, i, j, p, factor) is called for each key that a query
// sees, with p = exp(score - lse) and dropout's factor; `lse` is read if it is known and written
// otherwise.
template <class F>
void Definition(const AttentionOptions& o, const Array& q, const Array& k, const Array& q_document,
                const Array& k_document, Array& lse, bool lse_known, F probability) {
  const int64_t queries = q.dim(1), heads = q.dim(2), dim = q.dim(3);
  const int64_t keys = k.dim(1), group = heads / k.dim(2);
  std::vector<double> scores(keys);
  for (int64_t b = 0; b < q.dim(0); ++b) {
    for (int64_t n = 0; n < heads; ++n) {
      for (int64_t i = 0; i < queries; ++i) {
        double top = -std::numeric_limits<double>::infinity();
        for (int64_t j = 0; j < keys; ++j) {
          const int64_t position = i + o.query_offset;
          bool sees = !(o.causal && j > position) && !(o.window > 0 && j <= position - o.window);
          if (q_document.numel()) sees = sees && q_document(b, i) == k_document(b, j);
          scores[j] = -std::numeric_limits<double>::infinity();
          if (!sees) continue;
          const double* x = &q.v[((b * queries + i) * heads + n) * dim];
          const double* y = &k.v[((b * keys + j) * k.dim(2) + n / group) * dim];
          double dot = 0;
          for (int64_t h = 0; h < dim; ++h) dot += x[h] * y[h];
          scores[j] = dot * o.scale;
          if (!(scores[j] <= top)) top = scores[j];
        }
        double& l = lse(b, n, i);
        if (!lse_known) {
          double sum = 0;
          for (double s : scores)
            if (!std::isinf(s)) sum += std::exp(s - top);
          l = std::isinf(top) ? top : top + std::log(sum);
        }
        for (int64_t j = 0; j < keys; ++j)
          if (!std::isinf(scores[j]))
            probability(b, n, i, j, std::exp(scores[j] - l), DropoutFactor(o.dropout, b, n, i, j));
      }
    }
  }
}

// &x(b, t, n, 0), where x may have fewer heads than `heads`.
inline double* Row(Array& x, int64_t b, int64_t t, int64_t n, int64_t heads) {
  return &x.v[((b * x.dim(1) + t) * x.dim(2) + n * x.dim(2) / heads) * x.dim(3)];
}
inline const double* Row(const Array& x, int64_t b, int64_t t, int64_t n, int64_t heads) {
  return Row(const_cast<Array&>(x), b, t, n, heads);
}

inline void ForwardDefinition(const AttentionOptions& o, Array& out, Array& lse, const Array& q,
                              const Array& k, const Array& v, const Array& q_document,
                              const Array& k_document) {
  out.v.assign(out.numel(), 0);
  const int64_t heads = q.dim(2), dim = q.dim(3);
  Definition(o, q, k, q_document, k_document, lse, false,
             [&](int64_t b, int64_t n, int64_t i, int64_t j, double p, double factor) {
               double* to = Row(out, b, i, n, heads);
               const double* from = Row(v, b, j, n, heads);
               for (int64_t h = 0; h < dim; ++h) to[h] += p * factor * from[h];
             });
}

enum Argument { kDq, kDk, kDv, kDout, kQ, kK, kV, kOutput, kLse, kQDocument, kKDocument, kStarts };

// delta(b, n, i) = the sum of dout out.
inline void DeltaDefinition(Array& delta, const Array& dout, const Array& out) {
  const int64_t heads = out.dim(2), dim = out.dim(3);
  for (int64_t b = 0; b < out.dim(0); ++b)
    for (int64_t i = 0; i < out.dim(1); ++i)
      for (int64_t n = 0; n < heads; ++n) {
        const double *x = Row(dout, b, i, n, heads), *y = Row(out, b, i, n, heads);
        double& sum = delta(b, n, i) = 0;
        for (int64_t h = 0; h < dim; ++h) sum += x[h] * y[h];
      }
}

// Adds to dq, dk and dv.
inline void AddGradients(const AttentionOptions& o, Array& dq, Array& dk, Array& dv,
                         const Array& dout, const Array& q, const Array& k, const Array& v,
                         Array& lse, Array& delta, const Array& q_document,
                         const Array& k_document) {
  const int64_t heads = q.dim(2), dim = q.dim(3);
  Definition(o, q, k, q_document, k_document, lse, true,
             [&](int64_t b, int64_t n, int64_t i, int64_t j, double p, double factor) {
               const double *dy = Row(dout, b, i, n, heads), *x = Row(q, b, i, n, heads);
               const double *y = Row(k, b, j, n, heads), *z = Row(v, b, j, n, heads);
               double dp = 0;
               for (int64_t h = 0; h < dim; ++h) dp += dy[h] * z[h];
               const double ds = p * (factor * dp - delta(b, n, i)) * o.scale;
               double *to_q = Row(dq, b, i, n, heads), *to_k = Row(dk, b, j, n, heads),
                      *to_v = Row(dv, b, j, n, heads);
               for (int64_t h = 0; h < dim; ++h) {
                 to_q[h] += ds * y[h];
                 to_k[h] += ds * x[h];
                 to_v[h] += p * factor * dy[h];
               }
             });
}

inline void BackwardDefinition(const AttentionOptions& o, Arrays& a) {
  for (int i : {kDq, kDk, kDv}) a[i].v.assign(a[i].numel(), 0);
  Array delta = a[kLse];
  DeltaDefinition(delta, a[kDout], a[kOutput]);
  AddGradients(o, a[kDq], a[kDk], a[kDv], a[kDout], a[kQ], a[kK], a[kV], a[kLse], delta,
               a[kQDocument], a[kKDocument]);
}

}  // namespace shoal::kernels::testing
