// Definitions in double: the forward from the papers, the backward by the chain rule.
#pragma once

#include <cmath>

#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {

struct RowStatistics {
  double mean = 0, rstd = 0;
};

// RMSNorm takes no mean out.
inline RowStatistics StatisticsOf(const Array& x, int64_t row, bool centered, double eps) {
  const int64_t n = x.dim(1);
  RowStatistics s;
  if (centered)
    for (int64_t j = 0; j < n; ++j) s.mean += x(row, j) / n;
  double square = 0;
  for (int64_t j = 0; j < n; ++j) square += std::pow(x(row, j) - s.mean, 2) / n;
  s.rstd = 1 / std::sqrt(square + eps);
  return s;
}

// bias may be null.
inline double NormReference(const Array& x, int64_t row, int64_t column, const RowStatistics& s,
                            const Array& weight, const Array* bias) {
  return (x(row, column) - s.mean) * s.rstd * weight[column] + (bias ? (*bias)[column] : 0);
}

// Adds to dx [M, D], dweight [D] and dbias [D] (or null).
inline void NormBackwardReference(Array& dx, Array& dweight, Array* dbias, const Array& dy,
                                  const Array& x, const Array& weight, bool centered, double eps) {
  const int64_t n = x.dim(1);
  for (int64_t i = 0; i < x.dim(0); ++i) {
    const RowStatistics s = StatisticsOf(x, i, centered, eps);
    double mean_g = 0, mean_gh = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double g = dy(i, j) * weight[j], h = (x(i, j) - s.mean) * s.rstd;
      if (centered) mean_g += g / n;
      mean_gh += g * h / n;
      dweight[j] += dy(i, j) * h;
      if (dbias) (*dbias)[j] += dy(i, j);
    }
    for (int64_t j = 0; j < n; ++j) {
      const double g = dy(i, j) * weight[j], h = (x(i, j) - s.mean) * s.rstd;
      dx(i, j) += s.rstd * (g - mean_g - h * mean_gh);
    }
  }
}

}  // namespace shoal::kernels::testing
