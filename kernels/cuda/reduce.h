// Sums over rows in two stages of fixed order, which other kernels share.
#pragma once

#include "core/base/stream.h"
#include "core/base/view.h"

namespace shoal::kernels::cuda {

// out [N] = (accumulate ? out : 0) + the column sums of partials [count, N], added in order.
// partials holds f64 or f32; out's dtype is free.
void SumPartials(const Stream& stream, const char* op, const View& out, const View& partials,
                 bool accumulate);

}  // namespace shoal::kernels::cuda
