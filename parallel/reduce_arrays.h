// The arithmetic of a shared-memory all-reduce.
#pragma once

#include <span>

#include "core/base/dtype.h"
#include "parallel/communicator.h"

namespace shoal {

// out[i] = op over sources of source[i], for `count` elements and each of `outs`; sources in the
// order given, in Accumulator<T>. An out may be one of the sources.
void ReduceArrays(DType dtype, ReduceOp op, std::span<const void* const> sources,
                  std::span<void* const> outs, int64_t count);

}  // namespace shoal
