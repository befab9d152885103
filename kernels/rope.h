// Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split form of LLaMA: element
// i and i + H/2 of a head turn by the angle position * theta^(-2i/H).
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

// out, x [B, T, N, H] (out may alias x; both strided in B, T, N with the last dimension
// contiguous); positions i32 [B, T]. inverse turns back: it is the gradient.
SHOAL_KERNEL_WITH_SCRATCH(Rope,
                          (const Stream& stream, const View& out, const View& x,
                           const View& positions, double theta, bool inverse),
                          (stream, out, x, positions, theta, inverse))

}  // namespace shoal::kernels
