// The language-model head and its loss in one: logits = x w^T, loss = logsumexp(logits) -
// logits[label]. Works through chunks of tokens and computes the gradient of a chunk while its
// logits are there: they are computed once, and [tokens, vocab] is not held, but for the gradient
// of so few tokens that a wide sum of dw would take more.
#pragma once

#include <functional>

#include "kernels/dispatch.h"

namespace shoal::kernels {

// For a rank that holds the rows [first, first + V) of a vocabulary of `size`.
struct VocabularyShare {
  int64_t first = 0, size = 0;
  // What a row's softmax needs from all ranks, after this rank's part of the logits: `rows` [n, 3]
  // are the largest logit, the sum of e^(logit - largest), and the logit of the label or 0.
  // Replaces them by those of the whole vocabulary; called once a chunk.
  std::function<void(double* rows, int64_t n)> merge;
};

struct LinearCrossEntropyOptions {
  double gradient_scale = 1;   // of dx and dw: one over the step's global number of tokens
  int64_t chunk_tokens = 512;  // rows of logits at a time
  const VocabularyShare* share = nullptr;  // absent: w holds all rows
};

// x [M, D], w [V, D], labels i32 [M]; a negative label is ignored (no loss, no gradient), one that
// the vocabulary does not have is an Error(kData). losses [M] f32 (f64 for f64), unscaled, 0 where
// ignored. dx [M, D] and dw [V, D] may both be absent (evaluation). dw is added to if
// accumulate_dw. Both may be f32 while x and w are bf16. With a share, dx is this rank's part of a
// sum. Memory does not depend on how many labels are ignored, unless all are.
SHOAL_KERNEL_WITH_SCRATCH(LinearCrossEntropy,
                          (const Stream& stream, const View& losses, const View& dx, const View& dw,
                           bool accumulate_dw, const View& x, const View& w, const View& labels,
                           const LinearCrossEntropyOptions& options),
                          (stream, losses, dx, dw, accumulate_dw, x, w, labels, options))

}  // namespace shoal::kernels
