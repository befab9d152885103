// What the attention kernels share: the problem, and who sees whom. B batch, T queries, S keys, N
// heads, K kv heads, H head dim.
#pragma once

#include "kernels/attention.h"
#include "kernels/cuda/device_utils.cuh"

namespace shoal::kernels::cuda {

// A tensor [B, tokens, heads, H] with unit steps in H.
template <class T>
struct Heads {
  T* data;
  int64_t batch, token, head;

  explicit Heads(const View& view)
      : data(static_cast<T*>(view.data)),
        batch(view.strides[0]),
        token(view.strides[1]),
        head(view.strides[2]) {}
  __device__ T* Row(int64_t b, int64_t t, int64_t n) const {
    return data + b * batch + t * token + n * head;
  }
};

// Whether rows can be moved 16 bytes at a time.
inline bool RowsAligned16(const View& v) {
  const int64_t chunk = 16 / static_cast<int64_t>(SizeOf(v.dtype));
  return IsAligned16(v.data) && v.shape[3] % chunk == 0 && v.strides[0] % chunk == 0 &&
         v.strides[1] % chunk == 0 && v.strides[2] % chunk == 0;
}

struct AttentionMask {
  int64_t queries = 0, keys = 0;
  int64_t window = 0, offset = 0;
  bool causal = false;
  const int32_t *q_document = nullptr, *k_document = nullptr;  // of one batch entry, once ForBatch

  __device__ AttentionMask ForBatch(int64_t b) const {
    AttentionMask mask = *this;
    if (q_document) {
      mask.q_document += b * queries;
      mask.k_document += b * keys;
    }
    return mask;
  }
  // Queries [i, i_end) see no keys outside [FirstKey(i), EndKey(i_end)).
  __host__ __device__ int64_t FirstKey(int64_t i) const {
    const int64_t first = window > 0 ? i + offset - window + 1 : 0;
    return first > 0 ? first : 0;
  }
  __host__ __device__ int64_t EndKey(int64_t i_end) const {
    const int64_t end = causal ? i_end + offset : keys;
    return end < keys ? end : keys;
  }
  // Keys [j, j_end) are not seen by queries outside [FirstQuery(j), EndQuery(j_end)).
  __host__ __device__ int64_t FirstQuery(int64_t j) const {
    const int64_t first = causal ? j - offset : 0;
    return first > 0 ? first : 0;
  }
  __host__ __device__ int64_t EndQuery(int64_t j_end) const {
    const int64_t end = window > 0 ? j_end - 1 + window - offset : queries;
    return end < queries ? end : queries;
  }
  __device__ bool Sees(int64_t i, int64_t j) const {
    if (i >= queries || j >= keys) return false;
    if (causal && j > i + offset) return false;
    if (window > 0 && j <= i + offset - window) return false;
    return !q_document || q_document[i] == k_document[j];
  }
  // Whether each of queries [i, i_end) is sure to see each of keys [j, j_end).
  __device__ bool SeesAll(int64_t i, int64_t i_end, int64_t j, int64_t j_end) const {
    return i_end <= queries && j_end <= keys && !q_document &&
           (!causal || j_end - 1 <= i + offset) && (window <= 0 || j > i_end - 1 + offset - window);
  }
};

// What stays of the probabilities: kernels/attention.h says of what it is a function.
struct AttentionKeep {
  PhiloxKey key;
  const int64_t* starts = nullptr;
  int64_t starts_step = 1;
  int64_t first_head = 0, q_begin = 0, q_step = 1, k_begin = 0, k_step = 1;
  uint32_t threshold = 0;  // 0: everything stays
  double scale = 1;        // of what stays

  // Of one head of one sequence, once ForHead.
  uint64_t seed = 0;
  int64_t first = 0;
  __device__ AttentionKeep ForHead(int64_t b, int64_t n) const {
    AttentionKeep keep = *this;
    keep.seed = AttentionDropoutSeed(key, first_head + n);
    keep.first = starts[b * starts_step] + q_begin;
    return keep;
  }
  // Bit e: whether the probability of query i and key j + e stays.
  __device__ uint32_t Bits(int64_t i, int64_t j, int count) const {
    const auto query = static_cast<uint64_t>(first + i * q_step);
    uint64_t group = 0;
    Philox4 words;
    uint32_t bits = 0;
    for (int e = 0; e < count; ++e) {
      const auto k = static_cast<uint64_t>(k_begin + (j + e) * k_step);
      if (e == 0 || k / 8 != group) words = Philox({seed, group = k / 8}, query);
      bits |= static_cast<uint32_t>(AttentionDropoutHalf(words, k) >= threshold) << e;
    }
    return bits;
  }
};

struct AttentionProblem {
  int64_t batch = 0, heads = 0, kv_heads = 0;
  int head_dim = 0;
  double scale = 1;
  AttentionMask mask;
  AttentionKeep keep;

  // The row of lse and delta [B, N, T].
  __device__ int64_t StatisticsRow(int64_t b, int64_t n) const {
    return (b * heads + n) * mask.queries;
  }
};

// A block's share: one tile of one head of one batch entry. Under a causal mask later tiles have
// more to do and are started first.
struct AttentionTile {
  int64_t b, n, first;
  __device__ AttentionTile(int64_t tokens, int64_t heads, int size, bool last_first) {
    const int64_t tiles = CeilDiv(tokens, size);
    int64_t tile;
    const int64_t rest = DivMod(blockIdx.x, tiles, &tile);
    b = DivMod(rest, heads, &n);
    first = (last_first ? tiles - 1 - tile : tile) * size;
  }
};

struct AttentionArguments {
  View out, lse, q, k, v;
  AttentionProblem problem;
};

struct AttentionBackwardArguments {
  View dq, dk, dv, dout, q, k, v, lse;
  View delta;  // [B, N, T] as lse: the row sums of dout out
  AttentionProblem problem;
  bool add = false;  // to dq, dk and dv, which are then as wide as sums
};

// On tensor cores: bf16 with a head dimension of at most 128.
bool MmaAttentionApplies(const View& q);
void MmaAttention(const Stream& stream, const char* op, const AttentionArguments& a);
void MmaAttentionBackward(const Stream& stream, const char* op,
                          const AttentionBackwardArguments& a);

// Any dtype and head dimension, in plain arithmetic.
void PlainAttention(const Stream& stream, const char* op, const AttentionArguments& a);
void PlainAttentionBackward(const Stream& stream, const char* op,
                            const AttentionBackwardArguments& a);

}  // namespace shoal::kernels::cuda
