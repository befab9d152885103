// Scaled dot-product attention, tiled with an online softmax (Dao, arXiv 2307.08691): never holds
// [T, S] scores. Shapes: B batch, T queries, S keys, N heads, K kv heads (N a multiple of K), H
// head dim.
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

struct AttentionOptions {
  double scale = 1;    // of the scores, before the softmax
  bool causal = true;  // query i sees key j only if j <= i + query_offset
  int64_t window = 0;  // > 0: only if also j > i + query_offset - window
  int64_t query_offset =
      0;  // position of query 0 on the axis where key 0 is 0 (a KV cache's length)
};

// out [B, T, N, H]; lse [B, N, T] f32 (f64 for f64), the log of the softmax's denominator in
// natural logarithms. q [B, T, N, H]; k, v [B, S, K, H]; strided in B, T/S and heads, last
// dimension contiguous. q_document i32 [B, T] and k_document i32 [B, S] may both be absent ({});
// present, a query sees only keys of its own document. A row that sees no key gets out = 0 and lse
// = -inf.
SHOAL_KERNEL(Attention,
             (const Stream& stream, const View& out, const View& lse, const View& q, const View& k,
              const View& v, const View& q_document, const View& k_document,
              const AttentionOptions& options),
             (stream, out, lse, q, k, v, q_document, k_document, options))

// dq, dk, dv are written. Shapes as above; scores are recomputed from lse.
SHOAL_KERNEL(AttentionBackward,
             (const Stream& stream, const View& dq, const View& dk, const View& dv,
              const View& dout, const View& q, const View& k, const View& v, const View& out,
              const View& lse, const View& q_document, const View& k_document,
              const AttentionOptions& options),
             (stream, dq, dk, dv, dout, q, k, v, out, lse, q_document, k_document, options))

}  // namespace shoal::kernels
