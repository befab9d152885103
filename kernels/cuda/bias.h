#pragma once

#include "core/base/stream.h"
#include "core/base/view.h"

namespace shoal::kernels::cuda {

// AddBias with any mixture of f64, f32 and bf16.
void AddBiasAny(const Stream& stream, const View& out, const View& x, const View& bias);

}  // namespace shoal::kernels::cuda
