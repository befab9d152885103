// Pointwise functions of contiguous arrays of one shape and dtype. `out` may alias any input.
// GELU is the tanh form of GPT-2 (Hendrycks & Gimpel, arXiv 1606.08415, section 2); SwiGLU is
// silu(gate) * up (Shazeer, arXiv 2002.05202).
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

// out = alpha a + beta b. The dtypes of out, a and b may differ (a bf16 gradient into an f32 sum).
SHOAL_KERNEL(Add,
             (const Stream& stream, const View& out, const View& a, const View& b, double alpha,
              double beta),
             (stream, out, a, b, alpha, beta))
// out = alpha x
SHOAL_KERNEL(Scale, (const Stream& stream, const View& out, const View& x, double alpha),
             (stream, out, x, alpha))
// out = a b
SHOAL_KERNEL(Multiply, (const Stream& stream, const View& out, const View& a, const View& b),
             (stream, out, a, b))
// out [M, N] = x [M, N] + bias [N]
SHOAL_KERNEL(AddBias, (const Stream& stream, const View& out, const View& x, const View& bias),
             (stream, out, x, bias))

SHOAL_KERNEL(Gelu, (const Stream& stream, const View& out, const View& x), (stream, out, x))
// dx = dy gelu'(x)
SHOAL_KERNEL(GeluBackward, (const Stream& stream, const View& dx, const View& dy, const View& x),
             (stream, dx, dy, x))

SHOAL_KERNEL(Silu, (const Stream& stream, const View& out, const View& x), (stream, out, x))
// dx = dy silu'(x)
SHOAL_KERNEL(SiluBackward, (const Stream& stream, const View& dx, const View& dy, const View& x),
             (stream, dx, dy, x))

// out = silu(gate) up
SHOAL_KERNEL(SwiGlu, (const Stream& stream, const View& out, const View& gate, const View& up),
             (stream, out, gate, up))
// dgate = dy up silu'(gate); dup = dy silu(gate). dgate and dup may alias gate and up.
SHOAL_KERNEL(SwiGluBackward,
             (const Stream& stream, const View& dgate, const View& dup, const View& dy,
              const View& gate, const View& up),
             (stream, dgate, dup, dy, gate, up))

}  // namespace shoal::kernels
