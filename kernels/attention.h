// Scaled dot-product attention, tiled with an online softmax (Dao, arXiv 2307.08691): never holds
// [T, S] scores. Shapes: B batch, T queries, S keys, N heads, K kv heads (N a multiple of K), H
// head dim.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/base/philox.h"
#include "kernels/dispatch.h"

namespace shoal::kernels {

// Dropout of the probabilities, behind the softmax: each is multiplied by 0 or by 1 / (1 - p), and
// lse stays that of all of them. The mask is a function of the model's head, the query's number in
// the run and the key's place in its sequence, whoever computes them: a key k stays where half k %
// 8 of Philox({seed, k / 8}, query), 16 bits, is at least 2^16 p. So p is a multiple of 2^-16: it
// is rounded, but neither to 0 nor to 1. The seed is the head's, AttentionDropoutSeed.
struct AttentionDropout {
  double p = 0;            // 0: none, and nothing else is read
  PhiloxKey key;           // of the run and the layer
  int64_t first_head = 0;  // the model's number of head 0
  View sequence_starts;    // i64 [B]: the number in the run of each sequence's token 0
  // Query i is token q_begin + i q_step of its sequence, key j token k_begin + j k_step.
  int64_t q_begin = 0, q_step = 1, k_begin = 0, k_step = 1;

  uint32_t Threshold() const {
    return p > 0 ? static_cast<uint32_t>(std::clamp(std::nearbyint(p * 0x1p16), 1.0, 65535.0)) : 0;
  }
  double Scale() const { return 1 / (1 - Threshold() * 0x1p-16); }  // of what stays
};

SHOAL_HOST_DEVICE inline uint64_t AttentionDropoutSeed(const PhiloxKey& key, int64_t head) {
  const Philox4 words = Philox(key, static_cast<uint64_t>(head));
  return words.v[0] | static_cast<uint64_t>(words.v[1]) << 32;
}

// Half k % 8 of the four words.
SHOAL_HOST_DEVICE inline uint32_t AttentionDropoutHalf(const Philox4& words, uint64_t k) {
  return words.v[k % 8 / 2] >> (k % 2 * 16) & 0xffff;
}

struct AttentionOptions {
  double scale = 1;    // of the scores, before the softmax
  bool causal = true;  // query i sees key j only if j <= i + query_offset
  int64_t window = 0;  // > 0: only if also j > i + query_offset - window
  int64_t query_offset =
      0;  // position of query 0 on the axis where key 0 is 0 (a KV cache's length)
  AttentionDropout dropout = {};
};

// A tile of attention is that of some queries to some of their keys: the same call on parts of q, k
// and v, with query_offset the distance of their first positions. Attention over the parts of the
// keys is merged by MergeAttention, and AttentionBackwardTile adds up what they give to gradients.

// out [B, T, N, H] of q's dtype, or f32 for bf16 where it is to be merged; lse [B, N, T] f32 (f64
// for f64), the log of the softmax's denominator in natural logarithms. q [B, T, N, H]; k, v [B, S,
// K, H]; strided in B, T/S and heads, last dimension contiguous. q_document i32 [B, T] and
// k_document i32 [B, S] may both be absent ({}); present, a query sees only keys of its own
// document. A row that sees no key gets out = 0 and lse = -inf.
SHOAL_KERNEL_WITH_SCRATCH(Attention,
                          (const Stream& stream, const View& out, const View& lse, const View& q,
                           const View& k, const View& v, const View& q_document,
                           const View& k_document, const AttentionOptions& options),
                          (stream, out, lse, q, k, v, q_document, k_document, options))

// dq, dk, dv are written. Shapes as above; scores are recomputed from lse.
SHOAL_KERNEL_WITH_SCRATCH(AttentionBackward,
                          (const Stream& stream, const View& dq, const View& dk, const View& dv,
                           const View& dout, const View& q, const View& k, const View& v,
                           const View& out, const View& lse, const View& q_document,
                           const View& k_document, const AttentionOptions& options),
                          (stream, dq, dk, dv, dout, q, k, v, out, lse, q_document, k_document,
                           options))

// The same for a tile: dq, dk and dv are f32 (f64 for f64) and are added to. lse and delta [B, N,
// T] must be those of the whole attention, over all keys that a query sees: with those of the tile
// dq and dk would be wrong and dv right. They are f32 (f64 for f64).
SHOAL_KERNEL_WITH_SCRATCH(AttentionBackwardTile,
                          (const Stream& stream, const View& dq, const View& dk, const View& dv,
                           const View& dout, const View& q, const View& k, const View& v,
                           const View& lse, const View& delta, const View& q_document,
                           const View& k_document, const AttentionOptions& options),
                          (stream, dq, dk, dv, dout, q, k, v, lse, delta, q_document, k_document,
                           options))

// delta [B, N, T] f32 (f64 for f64) = the sums of dout out over H. dout, out [B, T, N, H] of one
// dtype, strided as q.
SHOAL_KERNEL(AttentionDelta,
             (const Stream& stream, const View& delta, const View& dout, const View& out),
             (stream, delta, dout, out))

// Attention to more keys: out and lse are updated by that to other keys, out_part and lse_part. out
// [B, T, N, H] is f32 (f64 for an f64 part), out_part [B, T, N, H] of that dtype or bf16; strided
// as q. lse and lse_part [B, N, T] are of out's dtype, strided in B and N. Either lse may be -inf:
// then the other side remains, to the last bit.
SHOAL_KERNEL(MergeAttention,
             (const Stream& stream, const View& out, const View& lse, const View& out_part,
              const View& lse_part),
             (stream, out, lse, out_part, lse_part))

}  // namespace shoal::kernels
