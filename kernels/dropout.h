// Dropout whose mask is a function of the global token, so that it is the same on any number of
// ranks.
#pragma once

#include "core/base/philox.h"
#include "kernels/dispatch.h"

namespace shoal::kernels {

// out [M, D] = x / (1 - p) where UniformFromWord(PhiloxWord(key, tokens[m] * D + d)) >= p, else 0.
// tokens i64 [M] is each row's global token number. out may alias x. The gradient is the same call
// on dy.
SHOAL_KERNEL(Dropout,
             (const Stream& stream, const View& out, const View& x, const View& tokens, double p,
              const PhiloxKey& key),
             (stream, out, x, tokens, p, key))

}  // namespace shoal::kernels
