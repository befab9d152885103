// Rows of a table by token id.
#pragma once

#include <cstdint>

#include "kernels/dispatch.h"

namespace shoal::kernels {

// A table that is the rows [first, first + V) of one with `size`; -1: it is whole.
struct TablePart {
  int64_t first = 0, size = -1;
};

// out [M, D] = table [V, D] at ids i32 [M]; zeros where an id's row is in another part. An id
// outside [0, size), or [0, V) of a whole table, is an Error(kData).
SHOAL_KERNEL(Embedding,
             (const Stream& stream, const View& out, const View& table, const View& ids,
              const TablePart& part = {}),
             (stream, out, table, ids, part))

// dtable [V, D] = (accumulate ? dtable : 0) + rows of dout [M, D] added at ids, in order of M, in
// Accumulator. dtable's dtype may differ from dout's. Rows of other parts are left out.
SHOAL_KERNEL_WITH_SCRATCH(EmbeddingBackward,
                          (const Stream& stream, const View& dtable, bool accumulate,
                           const View& dout, const View& ids, const TablePart& part = {}),
                          (stream, dtable, accumulate, dout, ids, part))

}  // namespace shoal::kernels
