#include "kernels/cuda/checks.h"

namespace shoal::kernels::cuda {

void CheckDense(const char* op, const char* name, const View& view, const Dims& shape) {
  SHOAL_CHECK(view.shape == shape, op, "{} is {}, not {}", name, view.shape.ToString(),
              shape.ToString());
  SHOAL_CHECK(view.data || shape.numel() == 0, op, "{} is absent", name);
  SHOAL_CHECK(view.contiguous(), op, "{} of shape {} has strides {}, not contiguous", name,
              view.shape.ToString(), view.strides.ToString());
}

void CheckRank(const char* op, const char* name, const View& view, int rank) {
  SHOAL_CHECK(view.rank() == rank, op, "{} is {}, not of {} dimensions", name,
              view.shape.ToString(), rank);
}

void CheckDType(const char* op, const char* name, const View& view, DType dtype) {
  SHOAL_CHECK(view.dtype == dtype, op, "{} is {}, not {}", name, Name(view.dtype), Name(dtype));
}

void CheckComputeDType(const char* op, const char* name, const View& view) {
  SHOAL_CHECK(view.dtype == DType::kF64 || view.dtype == DType::kF32 || view.dtype == DType::kBF16,
              op, "{} is {}, not f64, f32 or bf16", name, Name(view.dtype));
}

void CheckDenseAs(const char* op, const char* name, const View& view, const Dims& shape,
                  DType dtype) {
  CheckDense(op, name, view, shape);
  CheckDType(op, name, view, dtype);
}

void CheckUnitStride(const char* op, const char* name, const View& view) {
  SHOAL_CHECK(view.strides[-1] == 1 || view.shape[-1] <= 1, op,
              "{} of shape {} has strides {}, not 1 in the last dimension", name,
              view.shape.ToString(), view.strides.ToString());
}

}  // namespace shoal::kernels::cuda
