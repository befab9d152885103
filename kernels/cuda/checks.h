// Contract checks of the CUDA kernels; each throws Error(kBug) naming the kernel and both values.
#pragma once

#include <initializer_list>

#include "core/base/view.h"

namespace shoal::kernels::cuda {

// The view is present, has this shape and is contiguous.
void CheckDense(const char* op, const char* name, const View& view, const Dims& shape);
void CheckRank(const char* op, const char* name, const View& view, int rank);
void CheckDType(const char* op, const char* name, const View& view, DType dtype);
void CheckComputeDType(const char* op, const char* name, const View& view);  // f64, f32 or bf16
void CheckDenseAs(const char* op, const char* name, const View& view, const Dims& shape,
                  DType dtype);
// Strided access with unit steps inside the last dimension.
void CheckUnitStride(const char* op, const char* name, const View& view);

}  // namespace shoal::kernels::cuda
