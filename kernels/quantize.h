// Values in 8 bits: every row of [M, N] is cut into blocks of kQuantizeBlock (the last one may be
// shorter), each with a scale of its own. Symmetric, after the absmax block quantisation of
// Dettmers et al. (arXiv 2110.02861, section 2.1) with linear levels.
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

inline constexpr int64_t kQuantizeBlock = 64;
inline constexpr int64_t QuantizeBlocks(int64_t n) {
  return (n + kQuantizeBlock - 1) / kQuantizeBlock;
}
// Blocks whose largest value is smaller come back as zeros, those with a larger one, or with an
// infinity or a NaN, as NaN.
inline constexpr double kQuantizeSmallest = 0x1p-119, kQuantizeLargest = 0x1p119;

// scale = max |x| / 127 over the block, codes = x / scale rounded to nearest, ties to even: a value
// comes back within max |x| / 254 of what it was. codes i8 [M, N], scales f32 [M, blocks], x any
// float dtype.
SHOAL_KERNEL(Quantize, (const Stream& stream, const View& codes, const View& scales, const View& x),
             (stream, codes, scales, x))
// x = codes * scale.
SHOAL_KERNEL(Dequantize,
             (const Stream& stream, const View& x, const View& codes, const View& scales),
             (stream, x, codes, scales))

}  // namespace shoal::kernels
