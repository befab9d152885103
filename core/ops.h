// Differentiable operations. Each checks its arguments, runs a kernel and records its gradient.
// Integer inputs (ids, positions, labels) are i32 and have no gradient.
#pragma once

#include "core/autograd.h"
#include "core/base/philox.h"
#include "kernels/attention.h"
#include "kernels/embedding.h"
#include "kernels/linear_cross_entropy.h"

namespace shoal::ops {

// Pointwise; both of one shape and dtype.
Tensor Add(const Tensor& a, const Tensor& b);
Tensor Multiply(const Tensor& a, const Tensor& b);
Tensor Scale(const Tensor& x, double alpha);
Tensor Gelu(const Tensor& x);  // tanh form
Tensor Silu(const Tensor& x);
Tensor SwiGlu(const Tensor& gate, const Tensor& up);  // silu(gate) up
Tensor Cast(const Tensor& x, DType dtype);

// Shape.
Tensor Reshape(const Tensor& x, const Dims& shape);  // one dimension may be -1
Tensor Narrow(const Tensor& x, int dim, int64_t begin, int64_t count);

// f64 [1]: the sum of all elements.
Tensor Sum(const Tensor& x);

// [..., O] = x [..., I] weight [O, I]^T + bias [O]; bias may be undefined. The result is as wide as
// the product was summed if `wide`.
Tensor Linear(const Tensor& x, const Tensor& weight, const Tensor& bias = {}, bool wide = false);
// a [.., M, K] b [.., K, N], both 2-d or both 3-d. A transposed argument is a view (transpose
// flags).
Tensor Matmul(const Tensor& a, const Tensor& b, bool transpose_a = false, bool transpose_b = false);

// Over the last dimension; weight and bias [D].
Tensor RmsNorm(const Tensor& x, const Tensor& weight, double eps);
Tensor LayerNorm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps);
Tensor Softmax(const Tensor& x);

// x [B, T, N, H], positions i32 [B, T].
Tensor Rope(const Tensor& x, const Tensor& positions, double theta);

struct AttentionResult {
  Tensor out;  // [B, T, N, H]
  Tensor lse;  // [B, N, T], no gradient
};
// See kernels/attention.h. The documents may be undefined, and without dropout its sequence_starts.
AttentionResult Attention(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& q_document, const Tensor& k_document,
                          const kernels::AttentionOptions& options,
                          const Tensor& sequence_starts = {});

// table [V, D] at ids [...] -> [..., D]. Of a part of a table, zeros where the row is in another.
Tensor Embedding(const Tensor& table, const Tensor& ids, const kernels::TablePart& part = {});

// tokens i64 [M]: global token number of each row of x [M.., D]. p = 0 returns x.
Tensor Dropout(const Tensor& x, const Tensor& tokens, double p, const PhiloxKey& key);

// The mean negative log likelihood as f64 [1]: sum over labels / normalizer. The normalizer is the
// step's global number of tokens, the same on every rank and in every micro-batch, so that shares
// add up to the mean. x [..., D], weight [V, D], labels i32 [...]; a negative label is ignored.
// `share`: weight is one rank's part of the rows; then the gradient of x is a part of a sum, as
// wide as it was summed.
Tensor LinearCrossEntropy(const Tensor& x, const Tensor& weight, const Tensor& labels,
                          double normalizer, const kernels::VocabularyShare* share = nullptr);

}  // namespace shoal::ops
