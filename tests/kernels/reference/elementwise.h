// Definitions in double.
#pragma once

#include <cmath>

namespace shoal::kernels::testing {

// x (1 + tanh u) / 2, without the cancellation at negative u.
inline double GeluReference(double x) {
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  return x / (1 + std::exp(-2 * u));
}
inline double GeluSlopeReference(double x) {
  const double u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
  const double du = std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
  const double t = std::tanh(u);
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du;
}
inline double SiluReference(double x) { return x / (1 + std::exp(-x)); }
inline double SiluSlopeReference(double x) {
  const double s = 1 / (1 + std::exp(-x));
  return s * (1 + x * (1 - s));
}

}  // namespace shoal::kernels::testing
