// Attention in plain arithmetic: f64 and f32, and bf16 with head dimensions that the tensor-core
// kernels do not take. Tiles lie in shared memory in the accumulator's type; their sizes are chosen
// at run time so that any head dimension fits. Backward is two kernels, one that owns rows of dq
// and one that owns rows of dk and dv: no sum is shared between blocks.
#include <algorithm>
#include <limits>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/handles.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPatch = 4;  // a thread computes kPatch x kPatch elements at once

// Rows of a tile are `step` elements apart, an odd number so that they start in different banks.
struct TileShape {
  int queries = 0, keys = 0;  // multiples of kPatch
  int step = 0;
  __host__ __device__ int ScoreStep() const { return keys + 1; }
};

// tile [rows, H] = rows of a tensor; zeros from row `valid` on.
template <class A, class T>
__device__ void LoadTile(A* tile, int step, const T* from, int64_t token_stride, int rows,
                         int64_t valid, int head_dim) {
  for (int i = threadIdx.x; i < rows * head_dim; i += kThreads) {
    const int r = i / head_dim, h = i - r * head_dim;
    tile[r * step + h] = r < valid ? Widen<A>(from[r * token_stride + h]) : A(0);
  }
}

// `add`: to what is there.
template <class A, class T>
__device__ void StoreTile(T* to, int64_t token_stride, const A* tile, int step, int rows,
                          int64_t valid, int head_dim, bool add = false) {
  for (int i = threadIdx.x; i < rows * head_dim; i += kThreads) {
    const int r = i / head_dim, h = i - r * head_dim;
    if (r >= valid) continue;
    T& sum = to[r * token_stride + h];
    const A x = tile[r * step + h];
    sum = NarrowTo<T>(add ? Widen<A>(sum) + x : x);
  }
}

template <class A>
__device__ void ZeroTile(A* tile, int elements) {
  for (int i = threadIdx.x; i < elements; i += kThreads) tile[i] = 0;
}

// f(r, c, dots) for every patch: dots[i][j] = x row (r + i rows/4) . y row (c + j columns/4). With
// kPairs also of x2 and y2. Neighbouring threads have neighbouring c.
template <bool kPairs, class A, class F>
__device__ __forceinline__ void ForDots(const A* x, const A* y, const A* x2, const A* y2,
                                        TileShape tile, int head_dim, F&& f) {
  const int row_gap = tile.queries / kPatch, column_gap = tile.keys / kPatch;
  for (int patch = threadIdx.x; patch < row_gap * column_gap; patch += kThreads) {
    const int r = patch / column_gap, c = patch - r * column_gap;
    A dot[kPatch][kPatch] = {}, dot2[kPatch][kPatch] = {};
    const auto add = [&](A(&dots)[kPatch][kPatch], const A* rows, const A* columns) {
      A xs[kPatch], ys[kPatch];
#pragma unroll
      for (int i = 0; i < kPatch; ++i) xs[i] = rows[(r + i * row_gap) * tile.step];
#pragma unroll
      for (int j = 0; j < kPatch; ++j) ys[j] = columns[(c + j * column_gap) * tile.step];
#pragma unroll
      for (int i = 0; i < kPatch; ++i)
#pragma unroll
        for (int j = 0; j < kPatch; ++j) dots[i][j] += xs[i] * ys[j];
    };
    for (int h = 0; h < head_dim; ++h) {
      add(dot, x + h, y + h);
      if constexpr (kPairs) add(dot2, x2 + h, y2 + h);
    }
#pragma unroll
    for (int i = 0; i < kPatch; ++i)
#pragma unroll
      for (int j = 0; j < kPatch; ++j)
        f(r + i * row_gap, c + j * column_gap, dot[i][j], dot2[i][j]);
  }
}

// sums [rows, H] = row_factor sums + weights [rows, inner] values [inner, H]; row_factor may be
// null and weights is read with two strides.
template <class A>
__device__ __forceinline__ void AddProduct(A* sums, const A* row_factor, const A* weights,
                                           int row_stride, int inner_stride, const A* values,
                                           int rows, int inner, int step, int head_dim) {
  const int row_gap = rows / kPatch, column_gap = (head_dim + kPatch - 1) / kPatch;
  for (int patch = threadIdx.x; patch < row_gap * column_gap; patch += kThreads) {
    const int r = patch / column_gap, c = patch - r * column_gap;
    A sum[kPatch][kPatch];
#pragma unroll
    for (int i = 0; i < kPatch; ++i) {
      const int row = r + i * row_gap;
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        const int h = c + j * column_gap;
        sum[i][j] = h < head_dim ? sums[row * step + h] : A(0);
        if (row_factor) sum[i][j] *= row_factor[row];
      }
    }
    for (int k = 0; k < inner; ++k) {
      A ws[kPatch], vs[kPatch];
#pragma unroll
      for (int i = 0; i < kPatch; ++i)
        ws[i] = weights[(r + i * row_gap) * row_stride + k * inner_stride];
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        const int h = c + j * column_gap;
        vs[j] = h < head_dim ? values[k * step + h] : A(0);
      }
#pragma unroll
      for (int i = 0; i < kPatch; ++i)
#pragma unroll
        for (int j = 0; j < kPatch; ++j) sum[i][j] += ws[i] * vs[j];
    }
#pragma unroll
    for (int i = 0; i < kPatch; ++i)
#pragma unroll
      for (int j = 0; j < kPatch; ++j) {
        const int h = c + j * column_gap;
        if (h < head_dim) sums[(r + i * row_gap) * step + h] = sum[i][j];
      }
  }
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(Heads<Out> out, Accumulator<T>* lse, Heads<const T> q, Heads<const T> k,
                  Heads<const T> v, AttentionProblem p, TileShape tile) {
  using A = Accumulator<T>;
  constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();
  const AttentionTile at(p.mask.queries, p.heads, tile.queries, p.mask.causal);
  const AttentionMask mask = p.mask.ForBatch(at.b);
  const int64_t kv_head = at.n / (p.heads / p.kv_heads);
  const int64_t valid = mask.queries - at.first;
  const int step = tile.step, score_step = tile.ScoreStep(), head_dim = p.head_dim;

  A* q_tile = reinterpret_cast<A*>(DynamicShared());
  A* out_tile = q_tile + tile.queries * step;
  A* kv_tile = out_tile + tile.queries * step;
  A* scores = kv_tile + tile.keys * step;
  A* highest = scores + tile.queries * score_step;
  A* sum = highest + tile.queries;
  A* factor = sum + tile.queries;

  LoadTile(q_tile, step, q.Row(at.b, at.first, at.n), q.token, tile.queries, valid, head_dim);
  ZeroTile(out_tile, tile.queries * step);
  for (int r = threadIdx.x; r < tile.queries; r += kThreads) {
    highest[r] = kMinusInfinity;
    sum[r] = 0;
  }
  const bool drops = p.keep.threshold > 0;
  const AttentionKeep keep = drops ? p.keep.ForHead(at.b, at.n) : p.keep;
  const int64_t end = mask.EndKey(at.first + (valid < tile.queries ? valid : tile.queries));
  for (int64_t j = mask.FirstKey(at.first); j < end; j += tile.keys) {
    __syncthreads();  // the last tile's values are used up
    LoadTile(kv_tile, step, k.Row(at.b, j, kv_head), k.token, tile.keys, mask.keys - j, head_dim);
    __syncthreads();
    ForDots<false>(q_tile, kv_tile, q_tile, kv_tile, tile, head_dim, [&](int r, int c, A dot, A) {
      scores[r * score_step + c] =
          mask.Sees(at.first + r, j + c) ? dot * A(p.scale) : kMinusInfinity;
    });
    __syncthreads();
    LoadTile(kv_tile, step, v.Row(at.b, j, kv_head), v.token, tile.keys, mask.keys - j, head_dim);
    // Scores become exp(score - highest); a warp has a row at a time.
    for (int r = threadIdx.x / 32; r < tile.queries; r += kThreads / 32) {
      A* row = scores + r * score_step;
      A peak = highest[r];
      for (int c = threadIdx.x % 32; c < tile.keys; c += 32) peak = MaxOp()(peak, row[c]);
      peak = WarpReduce(peak, MaxOp());
      A total = 0;
      for (int c = threadIdx.x % 32; c < tile.keys; c += 32) {
        row[c] = row[c] == kMinusInfinity ? A(0) : exp(row[c] - peak);
        total += row[c];
        if (drops && !keep.Bits(at.first + r, j + c, 1)) row[c] = 0;
      }
      total = WarpReduce(total, SumOp());
      __syncwarp();  // all lanes have read highest[r]
      if (threadIdx.x % 32 == 0) {
        factor[r] = highest[r] == kMinusInfinity ? A(0) : exp(highest[r] - peak);
        sum[r] = sum[r] * factor[r] + total;
        highest[r] = peak;
      }
    }
    __syncthreads();
    AddProduct(out_tile, factor, scores, score_step, 1, kv_tile, tile.queries, tile.keys, step,
               head_dim);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < tile.queries; r += kThreads) {
    if (r < valid) {
      lse[p.StatisticsRow(at.b, at.n) + at.first + r] =
          sum[r] == A(0) ? kMinusInfinity : highest[r] + log(sum[r]);
    }
    factor[r] = sum[r] == A(0) ? A(0) : A(p.keep.scale) / sum[r];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tile.queries * head_dim; i += kThreads) {
    const int r = i / head_dim;
    out_tile[r * step + i - r * head_dim] *= factor[r];
  }
  __syncthreads();
  StoreTile(out.Row(at.b, at.first, at.n), out.token, out_tile, step, tile.queries, valid,
            head_dim);
}

// lse and delta of a tile of queries.
template <class A>
__device__ void LoadStatistics(A* lse_tile, A* delta_tile, const A* lse, const A* delta, int rows,
                               int64_t valid) {
  for (int r = threadIdx.x; r < rows; r += kThreads) {
    lse_tile[r] = r < valid ? lse[r] : A(0);
    delta_tile[r] = r < valid ? delta[r] : A(0);
  }
}

// dq = scale dS k with dS = P (dout v^T - delta), P = exp(scale q k^T - lse).
template <class T, class Out>
__global__ void __launch_bounds__(kThreads)
    QueryGradientKernel(Heads<Out> dq, Heads<const T> dout, Heads<const T> q, Heads<const T> k,
                        Heads<const T> v, const Accumulator<T>* lse, const Accumulator<T>* delta,
                        AttentionProblem p, TileShape tile, bool add) {
  using A = Accumulator<T>;
  const AttentionTile at(p.mask.queries, p.heads, tile.queries, p.mask.causal);
  const AttentionMask mask = p.mask.ForBatch(at.b);
  const int64_t kv_head = at.n / (p.heads / p.kv_heads);
  const int64_t valid = mask.queries - at.first;
  const int step = tile.step, score_step = tile.ScoreStep(), head_dim = p.head_dim;
  const A scale = A(p.scale);

  A* q_tile = reinterpret_cast<A*>(DynamicShared());
  A* dout_tile = q_tile + tile.queries * step;
  A* dq_tile = dout_tile + tile.queries * step;
  A* k_tile = dq_tile + tile.queries * step;
  A* v_tile = k_tile + tile.keys * step;
  A* dscores = v_tile + tile.keys * step;
  A* lse_tile = dscores + tile.queries * score_step;
  A* delta_tile = lse_tile + tile.queries;

  const int64_t row = p.StatisticsRow(at.b, at.n) + at.first;
  LoadTile(q_tile, step, q.Row(at.b, at.first, at.n), q.token, tile.queries, valid, head_dim);
  LoadTile(dout_tile, step, dout.Row(at.b, at.first, at.n), dout.token, tile.queries, valid,
           head_dim);
  ZeroTile(dq_tile, tile.queries * step);
  LoadStatistics(lse_tile, delta_tile, lse + row, delta + row, tile.queries, valid);
  const bool drops = p.keep.threshold > 0;
  const AttentionKeep keep = drops ? p.keep.ForHead(at.b, at.n) : p.keep;
  const int64_t end = mask.EndKey(at.first + (valid < tile.queries ? valid : tile.queries));
  for (int64_t j = mask.FirstKey(at.first); j < end; j += tile.keys) {
    __syncthreads();
    LoadTile(k_tile, step, k.Row(at.b, j, kv_head), k.token, tile.keys, mask.keys - j, head_dim);
    LoadTile(v_tile, step, v.Row(at.b, j, kv_head), v.token, tile.keys, mask.keys - j, head_dim);
    __syncthreads();
    ForDots<true>(q_tile, k_tile, dout_tile, v_tile, tile, head_dim,
                  [&](int r, int c, A score, A dprobability) {
                    if (drops)
                      dprobability *= keep.Bits(at.first + r, j + c, 1) ? A(keep.scale) : A(0);
                    dscores[r * score_step + c] = mask.Sees(at.first + r, j + c)
                                                      ? exp(score * scale - lse_tile[r]) *
                                                            (dprobability - delta_tile[r]) * scale
                                                      : A(0);
                  });
    __syncthreads();
    AddProduct(dq_tile, static_cast<const A*>(nullptr), dscores, score_step, 1, k_tile,
               tile.queries, tile.keys, step, head_dim);
  }
  __syncthreads();
  StoreTile(dq.Row(at.b, at.first, at.n), dq.token, dq_tile, step, tile.queries, valid, head_dim,
            add);
}

// dv = P^T dout and dk = scale dS^T q, summed over the heads that share the kv head, in order.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads)
    KeyGradientKernel(Heads<Out> dk, Heads<Out> dv, Heads<const T> dout, Heads<const T> q,
                      Heads<const T> k, Heads<const T> v, const Accumulator<T>* lse,
                      const Accumulator<T>* delta, AttentionProblem p, TileShape tile, bool add) {
  using A = Accumulator<T>;
  const AttentionTile at(p.mask.keys, p.kv_heads, tile.keys, false);
  const AttentionMask mask = p.mask.ForBatch(at.b);
  const int64_t group = p.heads / p.kv_heads, valid = mask.keys - at.first;
  const int step = tile.step, score_step = tile.ScoreStep(), head_dim = p.head_dim;
  const A scale = A(p.scale);

  A* k_tile = reinterpret_cast<A*>(DynamicShared());
  A* v_tile = k_tile + tile.keys * step;
  A* dk_tile = v_tile + tile.keys * step;
  A* dv_tile = dk_tile + tile.keys * step;
  A* q_tile = dv_tile + tile.keys * step;
  A* dout_tile = q_tile + tile.queries * step;
  A* probabilities = dout_tile + tile.queries * step;
  A* dscores = probabilities + tile.queries * score_step;
  A* lse_tile = dscores + tile.queries * score_step;
  A* delta_tile = lse_tile + tile.queries;

  LoadTile(k_tile, step, k.Row(at.b, at.first, at.n), k.token, tile.keys, valid, head_dim);
  LoadTile(v_tile, step, v.Row(at.b, at.first, at.n), v.token, tile.keys, valid, head_dim);
  ZeroTile(dk_tile, 2 * tile.keys * step);
  const int64_t first = mask.FirstQuery(at.first);
  const int64_t end = mask.EndQuery(at.first + (valid < tile.keys ? valid : tile.keys));
  const bool drops = p.keep.threshold > 0;
  for (int64_t n = at.n * group; n < (at.n + 1) * group; ++n) {
    const AttentionKeep keep = drops ? p.keep.ForHead(at.b, n) : p.keep;
    for (int64_t i = first; i < end; i += tile.queries) {
      const int64_t row = p.StatisticsRow(at.b, n) + i, rows = mask.queries - i;
      __syncthreads();
      LoadTile(q_tile, step, q.Row(at.b, i, n), q.token, tile.queries, rows, head_dim);
      LoadTile(dout_tile, step, dout.Row(at.b, i, n), dout.token, tile.queries, rows, head_dim);
      LoadStatistics(lse_tile, delta_tile, lse + row, delta + row, tile.queries, rows);
      __syncthreads();
      ForDots<true>(q_tile, k_tile, dout_tile, v_tile, tile, head_dim,
                    [&](int r, int c, A score, A dprobability) {
                      const A probability =
                          mask.Sees(i + r, at.first + c) ? exp(score * scale - lse_tile[r]) : A(0);
                      A factor = 1;
                      if (drops) {
                        factor = keep.Bits(i + r, at.first + c, 1) ? A(keep.scale) : A(0);
                        dprobability *= factor;
                      }
                      probabilities[r * score_step + c] = probability * factor;
                      dscores[r * score_step + c] =
                          probability * (dprobability - delta_tile[r]) * scale;
                    });
      __syncthreads();
      AddProduct(dv_tile, static_cast<const A*>(nullptr), probabilities, 1, score_step, dout_tile,
                 tile.keys, tile.queries, step, head_dim);
      AddProduct(dk_tile, static_cast<const A*>(nullptr), dscores, 1, score_step, q_tile, tile.keys,
                 tile.queries, step, head_dim);
    }
  }
  __syncthreads();
  StoreTile(dk.Row(at.b, at.first, at.n), dk.token, dk_tile, step, tile.keys, valid, head_dim, add);
  StoreTile(dv.Row(at.b, at.first, at.n), dv.token, dv_tile, step, tile.keys, valid, head_dim, add);
}

// Tiles in shared memory: of queries, of keys, and of scores.
struct TileCounts {
  int query_tiles, key_tiles, score_tiles, query_vectors;
  size_t Elements(const TileShape& t) const {
    return static_cast<size_t>(query_tiles * t.queries + key_tiles * t.keys) * t.step +
           static_cast<size_t>(score_tiles * t.queries) * t.ScoreStep() + query_vectors * t.queries;
  }
};
constexpr TileCounts kForwardTiles = {2, 1, 1, 3};
constexpr TileCounts kQueryGradientTiles = {3, 2, 1, 2};
constexpr TileCounts kKeyGradientTiles = {2, 4, 2, 2};

// The largest square tile of which two blocks fit a multiprocessor, or else one; no more queries
// than there are.
TileShape ChooseTile(const Stream& stream, const char* op, const AttentionProblem& p,
                     const TileCounts& counts, size_t element) {
  const size_t most = StateOf(stream.device.index).max_shared_bytes();
  TileShape tile;
  tile.step = p.head_dim | 1;
  const auto fits = [&](int size, size_t bytes) {
    tile.queries = tile.keys = size;
    while (tile.queries > kPatch && tile.queries / 2 >= p.mask.queries) tile.queries /= 2;
    return counts.Elements(tile) * element <= bytes;
  };
  if (fits(64, most / 2) || fits(32, most / 2) || fits(16, most / 2) || fits(16, most) ||
      fits(8, most) || fits(kPatch, most))
    return tile;
  SHOAL_FAIL(ErrorKind::kBug, op, "a head dimension of {} does not fit a multiprocessor's memory",
             p.head_dim);
}

// f(TypeTag<T>, TypeTag<Out>) for arguments of `dtype` and a result of that or of sums' dtype.
template <class F>
void VisitResult(DType dtype, DType result, const char* op, F&& f) {
  VisitFloat(dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (dtype == result)
      f(tag, tag);
    else
      f(tag, TypeTag<Accumulator<T>>());
  });
}

}  // namespace

void PlainAttention(const Stream& stream, const char* op, const AttentionArguments& a) {
  const AttentionProblem& p = a.problem;
  VisitResult(a.q.dtype, a.out.dtype, op, [&](auto tag, auto out) {
    using T = typename decltype(tag)::type;
    using Out = typename decltype(out)::type;
    using A = Accumulator<T>;
    const TileShape tile = ChooseTile(stream, op, p, kForwardTiles, sizeof(A));
    Launch(stream, op, (ForwardKernel<T, Out>),
           GridSize(op, p.batch * p.heads * CeilDiv(p.mask.queries, tile.queries)), kThreads,
           kForwardTiles.Elements(tile) * sizeof(A), Heads<Out>(a.out), a.lse.as<A>(),
           Heads<const T>(a.q), Heads<const T>(a.k), Heads<const T>(a.v), p, tile);
  });
}

void PlainAttentionBackward(const Stream& stream, const char* op,
                            const AttentionBackwardArguments& a) {
  const AttentionProblem& p = a.problem;
  VisitResult(a.q.dtype, a.dq.dtype, op, [&](auto tag, auto out) {
    using T = typename decltype(tag)::type;
    using Out = typename decltype(out)::type;
    using A = Accumulator<T>;
    const Heads<const T> dout(a.dout), q(a.q), k(a.k), v(a.v);
    TileShape tile = ChooseTile(stream, op, p, kQueryGradientTiles, sizeof(A));
    Launch(stream, op, (QueryGradientKernel<T, Out>),
           GridSize(op, p.batch * p.heads * CeilDiv(p.mask.queries, tile.queries)), kThreads,
           kQueryGradientTiles.Elements(tile) * sizeof(A), Heads<Out>(a.dq), dout, q, k, v,
           a.lse.as<A>(), a.delta.as<A>(), p, tile, a.add);
    tile = ChooseTile(stream, op, p, kKeyGradientTiles, sizeof(A));
    Launch(stream, op, (KeyGradientKernel<T, Out>),
           GridSize(op, p.batch * p.kv_heads * CeilDiv(p.mask.keys, tile.keys)), kThreads,
           kKeyGradientTiles.Elements(tile) * sizeof(A), Heads<Out>(a.dk), Heads<Out>(a.dv), dout,
           q, k, v, a.lse.as<A>(), a.delta.as<A>(), p, tile, a.add);
  });
}

}  // namespace shoal::kernels::cuda
