// Random fills whose element i is a function of (key, global index), whatever slice is held here.
#pragma once

#include "core/base/philox.h"
#include "kernels/dispatch.h"

namespace shoal::kernels {

// out [R, C] is rows [row, row + R) and columns [column, column + C) of a matrix with `columns`
// columns; element (r, c) of it has global index g = r * columns + c. Normal by Box-Muller: words
// 0, 1 of Philox(key, g / 4) give g % 4 = 0, 1 and words 2, 3 give 2, 3. Computed in f64, rounded
// once.
SHOAL_KERNEL(FillNormal,
             (const Stream& stream, const View& out, double std, int64_t row, int64_t column,
              int64_t columns, const PhiloxKey& key),
             (stream, out, std, row, column, columns, key))

// Uniform in [-bound, bound), from PhiloxWord(key, g).
SHOAL_KERNEL(FillUniform,
             (const Stream& stream, const View& out, double bound, int64_t row, int64_t column,
              int64_t columns, const PhiloxKey& key),
             (stream, out, bound, row, column, columns, key))

}  // namespace shoal::kernels
