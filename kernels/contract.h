// Checks of the contracts that kernel headers state, shared by the CPU and the CUDA side.
#pragma once

#include "core/base/view.h"

namespace shoal::kernels {

inline void CheckShape(const char* op, const char* name, const View& v, const Dims& want) {
  SHOAL_CHECK(v.shape == want, op, "{} has shape {}, not {}", name, v.shape.ToString(),
              want.ToString());
}
inline void CheckRank(const char* op, const char* name, const View& v, int rank) {
  SHOAL_CHECK(v.rank() == rank, op, "{} has shape {}, not {} dimensions", name, v.shape.ToString(),
              rank);
}
inline void CheckDType(const char* op, const char* name, const View& v, DType want) {
  SHOAL_CHECK(v.dtype == want, op, "{} is {}, not {}", name, ::shoal::Name(v.dtype),
              ::shoal::Name(want));
}
inline void CheckContiguous(const char* op, const char* name, const View& v) {
  SHOAL_CHECK(v.contiguous(), op, "{} of shape {} has strides {}, but must be contiguous", name,
              v.shape.ToString(), v.strides.ToString());
}
inline void CheckPresent(const char* op, const char* name, const View& v) {
  SHOAL_CHECK(v || v.numel() == 0, op, "{} is absent", name);
}

// `v` is present, contiguous, and of this shape and dtype.
inline void CheckArray(const char* op, const char* name, const View& v, const Dims& shape,
                       DType dtype) {
  CheckShape(op, name, v, shape);
  CheckDType(op, name, v, dtype);
  CheckContiguous(op, name, v);
  CheckPresent(op, name, v);
}

// `out` [N] and `x` [P, N], P > 0, of one float dtype; x's rows are contiguous.
inline void CheckRows(const char* op, const View& out, const View& x) {
  CheckRank(op, "x", x, 2);
  SHOAL_CHECK(x.dim(0) > 0 && IsFloat(x.dtype) && (x.dim(1) <= 1 || x.strides[1] == 1), op,
              "x is {} of shape {}, strides {}", ::shoal::Name(x.dtype), x.shape.ToString(),
              x.strides.ToString());
  CheckArray(op, "out", out, {x.dim(1)}, x.dtype);
}

}  // namespace shoal::kernels
