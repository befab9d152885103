// A matrix product as BLAS libraries want it, column-major, and how views become one. Host code
// without CUDA, so that tests reach it.
#pragma once

#include <optional>

#include "core/base/stream.h"
#include "core/base/view.h"

namespace shoal::kernels::cuda {

// Where operands begin, at least. One number for all, so that which algorithm runs, and so every
// bit of the result, does not depend on where a tensor happens to lie.
inline constexpr int kGemmAlignment = 16;

// One operand. `transposed`: memory holds the transpose of what the product reads.
struct GemmOperand {
  void* data = nullptr;
  bool transposed = false;
  int64_t leading = 0;       // elements from a column to the next
  int64_t batch_stride = 0;  // elements from a matrix to the next
};

// d (m x n) = left (m x k) right (k x n) + beta d + bias (m), all column-major, `batch` times.
struct Gemm {
  int64_t m = 0, n = 0, k = 0, batch = 1;
  DType in = DType::kF32, out = DType::kF32;
  GemmOperand left, right, d;
  const void* bias = nullptr;  // of out's dtype; null: none
  double beta = 0;
};

// The matrix view, of shape [rows, columns] in its last two dimensions, read as a column-major
// (columns x rows) matrix: what a row-major matrix is without moving anything. Nothing where
// neither dimension is contiguous or columns overlap.
inline std::optional<GemmOperand> ColumnMajorOperand(const View& view) {
  const int64_t rows = view.shape[-2], columns = view.shape[-1];
  const int64_t row_step = view.strides[-2], column_step = view.strides[-1];
  GemmOperand operand;
  operand.data = view.data;
  operand.batch_stride = view.rank() == 3 ? view.strides[0] : 0;
  if (column_step == 1 || columns == 1) {
    operand.leading = rows == 1 ? columns : row_step;
    if (operand.leading >= columns) return operand;
  }
  if (row_step == 1 || rows == 1) {
    operand.transposed = true;
    operand.leading = columns == 1 ? rows : column_step;
    if (operand.leading >= rows) return operand;
  }
  return std::nullopt;
}

// d [.., M, N] = a [.., M, K] b [.., K, N] as the product d^T = b^T a^T. The bias is left out.
inline std::optional<Gemm> PlanGemm(const View& d, const View& a, const View& b, double beta) {
  const auto left = ColumnMajorOperand(b), right = ColumnMajorOperand(a),
             out = ColumnMajorOperand(d);
  if (!left || !right || !out || out->transposed) return std::nullopt;
  Gemm gemm;
  gemm.m = d.shape[-1];
  gemm.n = d.shape[-2];
  gemm.k = a.shape[-1];
  gemm.batch = d.rank() == 3 ? d.shape[0] : 1;
  gemm.in = a.dtype;
  gemm.out = d.dtype;
  gemm.left = *left;
  gemm.right = *right;
  gemm.d = *out;
  gemm.beta = beta;
  return gemm;
}

// Queues the product with cuBLASLt (data and bias aligned as above); false where it has no kernel
// for it, and nothing is queued.
bool RunCublasLt(const Stream& stream, const char* op, const Gemm& gemm);

}  // namespace shoal::kernels::cuda
