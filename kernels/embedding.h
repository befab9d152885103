// Rows of a table by token id.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/dispatch.h"

namespace shoal::kernels {

// An id whose row is in another rank's part of the table: zeros here, and no gradient.
inline constexpr int32_t kElsewhere = std::numeric_limits<int32_t>::min();

// out [M, D] = table [V, D] at ids i32 [M]. An id outside [0, V) but kElsewhere is an Error(kData).
SHOAL_KERNEL(Embedding, (const Stream& stream, const View& out, const View& table, const View& ids),
             (stream, out, table, ids))

// dtable [V, D] = (accumulate ? dtable : 0) + rows of dout [M, D] added at ids, in order of M, in
// Accumulator. dtable's dtype may differ from dout's. Rows at kElsewhere are left out.
SHOAL_KERNEL_WITH_SCRATCH(EmbeddingBackward,
                          (const Stream& stream, const View& dtable, bool accumulate,
                           const View& dout, const View& ids),
                          (stream, dtable, accumulate, dout, ids))

}  // namespace shoal::kernels
