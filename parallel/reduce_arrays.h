// The arithmetic of a shared-memory all-reduce.
#pragma once

#include <span>

#include "core/base/dtype.h"
#include "parallel/communicator.h"

namespace shoal {

// out[i] = op over sources of source[i], for `count` elements, sources in the order given, in
// Accumulator<T>. out may be one of the sources.
void ReduceArrays(DType dtype, ReduceOp op, std::span<const void* const> sources, void* out,
                  int64_t count);

}  // namespace shoal
