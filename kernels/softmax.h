// Softmax over the last dimension of [M, N], with the row maximum taken out first.
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

// out may alias x.
SHOAL_KERNEL_WITH_SCRATCH(Softmax, (const Stream& stream, const View& out, const View& x),
                          (stream, out, x))
// dx = out (dy - sum(dy out)). dx may alias dy.
SHOAL_KERNEL(SoftmaxBackward,
             (const Stream& stream, const View& dx, const View& dy, const View& out),
             (stream, dx, dy, out))

}  // namespace shoal::kernels
