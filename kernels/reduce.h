// Sums in a fixed order: blocks of fixed size, then the blocks in order, so that neither the number
// of threads nor the machine's vector width changes which elements are added together.
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

// out f64 [1] = sum of x (contiguous, any shape), accumulated in f64 per block.
SHOAL_KERNEL_WITH_SCRATCH(Sum, (const Stream& stream, const View& out, const View& x),
                          (stream, out, x))

// out f64 [1] = sum of x^2, accumulated in f64 per block.
SHOAL_KERNEL_WITH_SCRATCH(SumSquares, (const Stream& stream, const View& out, const View& x),
                          (stream, out, x))

// out [N] = (accumulate ? out : 0) + column sums of x [M, N]. out's dtype may differ from x's.
SHOAL_KERNEL_WITH_SCRATCH(SumRows,
                          (const Stream& stream, const View& out, const View& x, bool accumulate),
                          (stream, out, x, accumulate))

}  // namespace shoal::kernels
