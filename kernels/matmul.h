// Matrix products in any layout: transposition is a stride, not a flag and never a copy.
// CPU: oneDNN for f32 and bf16 (f32 accumulate), our own Highway tiles for f64.
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

// d [M, N] = a [M, K] b [K, N] + beta d + bias [N], or with one leading batch dimension on d, a and
// b. Strided: a and b need stride 1 in one of their last two dimensions, d in its last. d may be
// wider than a and b (bf16 products into f32). bias may be absent ({}) and has d's or a's dtype.
// beta is 0 or 1; with 0, d is not read.
SHOAL_KERNEL_WITH_SCRATCH(Matmul,
                          (const Stream& stream, const View& d, const View& a, const View& b,
                           const View& bias, double beta),
                          (stream, d, a, b, bias, beta))

}  // namespace shoal::kernels
