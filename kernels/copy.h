// Copies, casts and fills.
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

// out = x, converted to out's dtype. Strided on both sides, any dtypes; same shape.
SHOAL_KERNEL(Copy, (const Stream& stream, const View& out, const View& x), (stream, out, x))

// Every element of out = value. Strided, any dtype.
SHOAL_KERNEL(Fill, (const Stream& stream, const View& out, double value), (stream, out, value))

}  // namespace shoal::kernels
