// Normalisation over the last dimension. Statistics are Accumulator<T>, one per row.
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

// RMSNorm (Zhang & Sennrich, arXiv 1910.07467, eq. 4): out = x rstd weight, rstd = (mean(x^2) +
// eps)^-1/2. out, x [M, D]; weight [D]; rstd [M] f32 (f64 for f64).
SHOAL_KERNEL(RmsNorm,
             (const Stream& stream, const View& out, const View& rstd, const View& x,
              const View& weight, double eps),
             (stream, out, rstd, x, weight, eps))

// dx [M, D] and dweight [D]; each is added to where its flag says so, else written. dweight's dtype
// may be wider than x's. dx may alias dy when accumulate_dx is false.
SHOAL_KERNEL_WITH_SCRATCH(RmsNormBackward,
                          (const Stream& stream, const View& dx, bool accumulate_dx,
                           const View& dweight, bool accumulate_dweight, const View& dy,
                           const View& x, const View& weight, const View& rstd),
                          (stream, dx, accumulate_dx, dweight, accumulate_dweight, dy, x, weight,
                           rstd))

// LayerNorm (Ba et al., arXiv 1607.06450): out = (x - mean) rstd weight + bias, variance without
// Bessel's correction. mean, rstd [M] f32 (f64 for f64).
SHOAL_KERNEL(LayerNorm,
             (const Stream& stream, const View& out, const View& mean, const View& rstd,
              const View& x, const View& weight, const View& bias, double eps),
             (stream, out, mean, rstd, x, weight, bias, eps))

// As RmsNormBackward; dweight and dbias share their accumulate flag.
SHOAL_KERNEL_WITH_SCRATCH(LayerNormBackward,
                          (const Stream& stream, const View& dx, bool accumulate_dx,
                           const View& dweight, const View& dbias, bool accumulate_dweight,
                           const View& dy, const View& x, const View& weight, const View& mean,
                           const View& rstd),
                          (stream, dx, accumulate_dx, dweight, dbias, accumulate_dweight, dy, x,
                           weight, mean, rstd))

}  // namespace shoal::kernels
