// Shared by the ops' sources.
#pragma once

#include <array>

#include "core/autograd.h"
#include "core/placement_rules.h"
#include "core/tensor.h"

namespace shoal::ops {

inline const Stream& CurrentStream() { return ExecutionContext::Current().stream(); }

inline void CheckAlike(const char* op, const Tensor& a, const Tensor& b) {
  SHOAL_CHECK(a.shape() == b.shape() && a.dtype() == b.dtype(), op, "operands {} {} and {} {}",
              Name(a.dtype()), a.shape().ToString(), Name(b.dtype()), b.shape().ToString());
}

// `t` itself if its memory is nobody else's, else a copy. By value: a caller gives its own up.
// NOLINTNEXTLINE(performance-unnecessary-value-param)
inline Tensor Overwritable(Tensor t) { return t.exclusive() && t.contiguous() ? t : t.Clone(); }

// [..., D] as a matrix [M, D].
inline Tensor Rows(const Tensor& x) { return x.Reshaped({-1, x.dim(-1)}); }

}  // namespace shoal::ops
