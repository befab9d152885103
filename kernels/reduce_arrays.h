// What ranks bring, taken together in their order: the arithmetic of all-reduce and reduce-scatter.
#pragma once

#include <span>

#include "core/base/dtype.h"
#include "kernels/dispatch.h"

namespace shoal {

enum class ReduceOp { kSum, kMax };  // the largest; NaN of any is NaN

namespace kernels {

// out [N] = op over p of x [P, N], in the order of p, in Accumulator<T>. x and out have one float
// dtype; rows of x are contiguous and may lie apart.
SHOAL_KERNEL(ReduceInOrder, (const Stream& stream, ReduceOp op, const View& out, const View& x),
             (stream, op, out, x))

namespace cpu {
// The same of arrays that lie anywhere, into each of `outs`, `count` elements each, on the calling
// thread. An out may be one of the sources.
void ReduceArrays(DType dtype, ReduceOp op, std::span<const void* const> sources,
                  std::span<void* const> outs, int64_t count);
}  // namespace cpu

}  // namespace kernels
}  // namespace shoal
