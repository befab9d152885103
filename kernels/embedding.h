// Rows of a table by token id.
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

// out [M, D] = table [V, D] at ids i32 [M]. An id outside [0, V) is an Error(kData).
SHOAL_KERNEL(Embedding, (const Stream& stream, const View& out, const View& table, const View& ids),
             (stream, out, table, ids))

// dtable [V, D] = (accumulate ? dtable : 0) + rows of dout [M, D] added at ids, in order of M, in
// Accumulator. dtable's dtype may differ from dout's.
SHOAL_KERNEL(EmbeddingBackward,
             (const Stream& stream, const View& dtable, bool accumulate, const View& dout,
              const View& ids),
             (stream, dtable, accumulate, dout, ids))

}  // namespace shoal::kernels
