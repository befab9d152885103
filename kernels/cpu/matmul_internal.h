// What the parts of the CPU matmul share: one product, after its views were checked.
#pragma once

#include <cstdint>

#include "core/base/stream.h"
#include "core/base/view.h"

namespace shoal::kernels::cpu {

// d[z] [M, N] = a[z] [M, K] b[z] [K, N] + bias [N] + (accumulate ? d[z] : 0) for z < batch, all
// sizes at least 1. Strides in elements; each of a and b has stride 1 in one dimension.
struct Product {
  int64_t batch, m, n, k;
  int64_t a_batch, a_row, a_column;
  int64_t b_batch, b_row, b_column;
  int64_t d_batch, d_row;
  const void* a;
  const void* b;
  const void* bias;  // null: none
  void* d;
  DType operand;  // of a and b
  DType result;   // of d
  DType bias_type;
  bool accumulate;
};

// f32 and bf16, by oneDNN.
void MatmulDnnl(const Stream& stream, const Product& p);

// oneDNN 2.6 has no f64, so this product is our own.
void MatmulF64(const Stream& stream, const Product& p);

}  // namespace shoal::kernels::cpu
