// The product that kernels/cuda/gemm.h hands to cuBLASLt, taken by its word.
#include "tests/cuda_emulation/emulated_gemm.h"

#include <cuda_runtime.h>

#include "kernels/cuda/gemm.h"

namespace cuda_emulation {
Library library = Library::kWhole;
}

namespace shoal::kernels::cuda {
namespace {

double Load(const void* data, DType dtype, int64_t i) {
  return VisitFloat(dtype, "emulated gemm", [&](auto tag) {
    return static_cast<double>(static_cast<const typename decltype(tag)::type*>(data)[i]);
  });
}

int64_t Index(const GemmOperand& operand, int64_t batch, int64_t row, int64_t column) {
  if (operand.transposed) std::swap(row, column);
  return batch * operand.batch_stride + row + column * operand.leading;
}

}  // namespace

bool RunCublasLt(const Stream&, const char* op, const Gemm& g) {
  if (cuda_emulation::library == cuda_emulation::Library::kAbsent) return false;
  const bool epilogue =
      cuda_emulation::library == cuda_emulation::Library::kWhole && g.in != DType::kF64;
  if (g.bias && !epilogue) return false;
  if (g.in != g.out && !(g.in == DType::kBF16 && g.out == DType::kF32)) return false;
  for (const void* data :
       {static_cast<const void*>(g.left.data), static_cast<const void*>(g.right.data),
        static_cast<const void*>(g.d.data), g.bias})
    SHOAL_CHECK(reinterpret_cast<uintptr_t>(data) % kGemmAlignment == 0, op, "misaligned");
  SHOAL_CHECK(!g.d.transposed && g.d.leading >= g.m, op, "a bad layout of d");
  const cuda_emulation::DeviceAccess access;
  for (int64_t batch = 0; batch < g.batch; ++batch) {
    for (int64_t column = 0; column < g.n; ++column) {
      for (int64_t row = 0; row < g.m; ++row) {
        double sum = 0;
        for (int64_t i = 0; i < g.k; ++i)
          sum += Load(g.left.data, g.in, Index(g.left, batch, row, i)) *
                 Load(g.right.data, g.in, Index(g.right, batch, i, column));
        const int64_t at = Index(g.d, batch, row, column);
        if (g.beta != 0) sum += g.beta * Load(g.d.data, g.out, at);
        if (g.bias) sum += Load(g.bias, g.out, row);
        VisitFloat(g.out, op, [&](auto tag) {
          using T = typename decltype(tag)::type;
          static_cast<T*>(g.d.data)[at] = static_cast<T>(sum);
        });
      }
    }
  }
  return true;
}

}  // namespace shoal::kernels::cuda
