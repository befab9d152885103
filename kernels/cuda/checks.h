// Contract checks that only the CUDA kernels need, on top of the shared ones.
#pragma once

#include "kernels/contract.h"

namespace shoal::kernels::cuda {

// `v` is present, contiguous and of this shape, whatever its dtype.
inline void CheckDense(const char* op, const char* name, const View& v, const Dims& shape) {
  CheckArray(op, name, v, shape, v.dtype);
}

inline void CheckComputeDType(const char* op, const char* name, const View& v) {
  SHOAL_CHECK(v.dtype == DType::kF64 || v.dtype == DType::kF32 || v.dtype == DType::kBF16, op,
              "{}: computes in f64, f32 or bf16, not {}", name, Name(v.dtype));
}

// Strided, but with unit steps inside the last dimension.
inline void CheckUnitStride(const char* op, const char* name, const View& v) {
  SHOAL_CHECK(v.strides[-1] == 1 || v.shape[-1] <= 1, op,
              "{} of shape {} has strides {}, not 1 in the last dimension", name,
              v.shape.ToString(), v.strides.ToString());
}

}  // namespace shoal::kernels::cuda
