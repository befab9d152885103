// Attention on tensor cores: bf16 products with f32 sums (Dao, arXiv 2307.08691, algorithms 1 and
// 2). A block has four warps; a warp owns 16 rows of the output, holds their scores and sums in
// registers, and passes scores on to the second product without leaving them. Backward is two
// kernels, one that owns rows of dq and one that owns rows of dk and dv, each with its own scores:
// two more products than with shared sums, but the same bits on every run.
#include <limits>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/mma.cuh"

namespace shoal::kernels::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;  // of a block's output
constexpr int kKeys = 64;           // of a tile that dq or the output is summed over
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Elements between the rows of a tile [.., kDim] in shared memory: an odd multiple of 16 bytes, so
// that the eight rows of a matrix lie in different banks.
template <int kDim>
constexpr int kStep = kDim + 8;

// Starts loading a tile [kTokens, kDim], zeros from row `valid` and column head_dim on.
template <int kTokens, int kDim>
__device__ __forceinline__ void LoadTile(BF16* tile, const BF16* from, int64_t token_stride,
                                         int64_t valid, int head_dim, bool vector) {
  constexpr int kChunks = kDim / 8;
  for (int i = threadIdx.x; i < kTokens * kChunks; i += kThreads) {
    const int r = i / kChunks, h = i % kChunks * 8;
    BF16* to = tile + r * kStep<kDim> + h;
    const BF16* source = from + r * token_stride + h;
    if (vector) {
      const bool present = r < valid && h < head_dim;
      CopyAsync16(to, present ? source : from, present);
    } else {
      for (int e = 0; e < 8; ++e) to[e] = r < valid && h + e < head_dim ? source[e] : BF16(0.0f);
    }
  }
}

__device__ __forceinline__ int Lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int Warp() { return threadIdx.x / 32; }
// The row and the column of element i of a C fragment.
__device__ __forceinline__ int FragmentRow(int i) { return Lane() / 4 + 8 * (i / 2); }
__device__ __forceinline__ int FragmentColumn(int i) { return 2 * (Lane() % 4) + i % 2; }

// sums (16 x kN) += x y^T: x are the 16 rows at `x` [16, kDim], y is a tile [kN, kDim].
template <int kN, int kDim>
__device__ __forceinline__ void AddProductOfRows(float (&sums)[kN / 8][4], const BF16* x,
                                                 const BF16* y) {
  const int lane = Lane();
  x += lane % 16 * kStep<kDim> + lane / 16 * 8;
  y += (lane % 8 + lane / 16 * 8) * kStep<kDim> + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    uint32_t a[4];
    LoadMatrices(a, x + k);
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32_t b[4];
      LoadMatrices(b, y + n * kStep<kDim> + k);
      Mma(sums[n / 8], a, b[0], b[1]);
      Mma(sums[n / 8 + 1], a, b[2], b[3]);
    }
  }
}

// sums (16 x kDim) += w y: w (16 x kK) lies in C fragments, rounded to bf16 here; y is a tile
// [kK, kDim].
template <int kK, int kDim>
__device__ __forceinline__ void AddWeightedRows(float (&sums)[kDim / 8][4],
                                                const float (&w)[kK / 8][4], const BF16* y) {
  const int lane = Lane();
  y += lane % 16 * kStep<kDim> + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kK; k += 16) {
    const auto &left = w[k / 8], &right = w[k / 8 + 1];
    const uint32_t a[4] = {PackBF16(left[0], left[1]), PackBF16(left[2], left[3]),
                           PackBF16(right[0], right[1]), PackBF16(right[2], right[3])};
#pragma unroll
    for (int h = 0; h < kDim; h += 16) {
      uint32_t b[4];
      LoadMatricesTransposed(b, y + k * kStep<kDim> + h);
      Mma(sums[h / 8], a, b[0], b[1]);
      Mma(sums[h / 8 + 1], a, b[2], b[3]);
    }
  }
}

// Writes factor[row half] * sums (16 x kDim) to rows from `first` on, or adds it to f32 there.
template <int kDim, class Out>
__device__ __forceinline__ void StoreRows(Heads<Out> to, const AttentionTile& at, int64_t first,
                                          int64_t tokens, const float (&sums)[kDim / 8][4],
                                          const float (&factor)[2], int head_dim, bool vector,
                                          bool add = false) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + FragmentRow(2 * half);
    if (row >= tokens) continue;
    Out* out = to.Row(at.b, row, at.n);
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
      const int h = 8 * t + FragmentColumn(0);
      const float pair[2] = {factor[half] * sums[t][2 * half],
                             factor[half] * sums[t][2 * half + 1]};
      if constexpr (std::is_same_v<Out, BF16>) {
        if (h < head_dim) StoreChunk(out + h, pair, head_dim - h, vector);
      } else {
        for (int e = 0; e < 2 && h + e < head_dim; ++e)
          out[h + e] = add ? out[h + e] + pair[e] : pair[e];
      }
    }
  }
}

// The sum or maximum over the four lanes that share a row.
template <class Op>
__device__ __forceinline__ float RowReduce(float x, Op op) {
  x = op(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return op(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Which probabilities of queries [i, i + kQueries) and kRows or kKeys keys from j on stay: a bit
// for each, eight keys to a byte.
template <int kQueries, int kTileKeys>
struct KeepTile {
  static constexpr int kBytes = kTileKeys / 8;
  uint8_t bytes[kQueries * kBytes];

  __device__ __forceinline__ void Draw(const AttentionKeep& keep, int64_t i, int64_t j) {
    for (int e = threadIdx.x; e < kQueries * kBytes; e += kThreads)
      bytes[e] = static_cast<uint8_t>(keep.Bits(i + e / kBytes, j + e % kBytes * 8, 8));
  }
  __device__ __forceinline__ bool Keeps(int query, int key) const {
    return bytes[query * kBytes + key / 8] >> key % 8 & 1;
  }
};

template <int kDim, bool kDrop, class Out>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(Heads<Out> out, float* lse, Heads<const BF16> q, Heads<const BF16> k,
                  Heads<const BF16> v, AttentionProblem p, bool vector_in, bool vector_out) {
  const AttentionTile at(p.mask.queries, p.heads, kRows, p.mask.causal);
  const AttentionMask mask = p.mask.ForBatch(at.b);
  const int64_t kv_head = at.n / (p.heads / p.kv_heads);
  const int64_t valid = mask.queries - at.first;
  const int64_t first = at.first + 16 * Warp();  // of this warp's rows
  const float scale = static_cast<float>(p.scale) * kLog2E;
  BF16* q_tile = reinterpret_cast<BF16*>(DynamicShared());
  BF16* k_tile = q_tile + kRows * kStep<kDim>;
  BF16* v_tile = k_tile + kKeys * kStep<kDim>;
  const auto load_k = [&](int64_t j) {
    LoadTile<kKeys, kDim>(k_tile, k.Row(at.b, j, kv_head), k.token, mask.keys - j, p.head_dim,
                          vector_in);
  };

  float sums[kDim / 8][4] = {}, total[2] = {}, highest[2] = {-kInfinity, -kInfinity};
  const int64_t end = mask.EndKey(at.first + (valid < kRows ? valid : kRows));
  int64_t j = mask.FirstKey(at.first);
  LoadTile<kRows, kDim>(q_tile, q.Row(at.b, at.first, at.n), q.token, valid, p.head_dim, vector_in);
  if (j < end) load_k(j);
  CommitCopies();
  [[maybe_unused]] __shared__ KeepTile<kRows, kKeys> kept;
  [[maybe_unused]] AttentionKeep keep;
  if constexpr (kDrop) keep = p.keep.ForHead(at.b, at.n);
  for (; j < end; j += kKeys) {
    LoadTile<kKeys, kDim>(v_tile, v.Row(at.b, j, kv_head), v.token, mask.keys - j, p.head_dim,
                          vector_in);
    CommitCopies();
    if constexpr (kDrop) kept.Draw(keep, at.first, j);
    WaitForCopies<1>();  // q and k are there, v on its way
    __syncthreads();
    float scores[kKeys / 8][4] = {};
    AddProductOfRows<kKeys, kDim>(scores, q_tile + 16 * Warp() * kStep<kDim>, k_tile);
    __syncthreads();  // k is used up
    if (j + kKeys < end) load_k(j + kKeys);
    CommitCopies();

    const bool all = mask.SeesAll(first, first + 16, j, j + kKeys);
    float peak[2] = {highest[0], highest[1]};
#pragma unroll
    for (int t = 0; t < kKeys / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[t][i] *= scale;
        if (!all && !mask.Sees(first + FragmentRow(i), j + 8 * t + FragmentColumn(i)))
          scores[t][i] = -kInfinity;
        peak[i / 2] = fmaxf(peak[i / 2], scores[t][i]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      peak[half] = RowReduce(peak[half], [](float a, float b) { return fmaxf(a, b); });
      // A row that has seen nothing yet: any finite number will do.
      const float base = peak[half] == -kInfinity ? 0.0f : peak[half];
      const float factor = exp2f(highest[half] - base);
      highest[half] = peak[half];
      total[half] *= factor;
#pragma unroll
      for (int t = 0; t < kKeys / 8; ++t) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[t][i] = exp2f(scores[t][i] - base);
          total[half] += scores[t][i];
          if constexpr (kDrop) {
            if (!kept.Keeps(16 * Warp() + FragmentRow(i), 8 * t + FragmentColumn(i)))
              scores[t][i] = 0;
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kDim / 8; ++t) {
        sums[t][2 * half] *= factor;
        sums[t][2 * half + 1] *= factor;
      }
    }
    WaitForCopies<1>();  // v is there, the next k on its way
    __syncthreads();
    AddWeightedRows<kKeys, kDim>(sums, scores, v_tile);
    __syncthreads();  // v is used up
  }
  WaitForCopies<0>();  // where there was no key to see
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = RowReduce(total[half], SumOp());
    const float whole = kDrop ? static_cast<float>(p.keep.scale) : 1.0f;
    factor[half] = total[half] == 0.0f ? 0.0f : whole / total[half];
    const int64_t row = first + FragmentRow(2 * half);
    if (Lane() % 4 == 0 && row < mask.queries) {
      lse[p.StatisticsRow(at.b, at.n) + row] =
          total[half] == 0.0f ? -kInfinity : highest[half] * kLn2 + logf(total[half]);
    }
  }
  StoreRows<kDim>(out, at, first, mask.queries, sums, factor, p.head_dim, vector_out);
}

// dq = scale dS k with dS = P (dout v^T - delta), P = exp(scale q k^T - lse).
template <int kDim, bool kDrop, class Out>
__global__ void __launch_bounds__(kThreads)
    QueryGradientKernel(Heads<Out> dq, Heads<const BF16> dout, Heads<const BF16> q,
                        Heads<const BF16> k, Heads<const BF16> v, const float* lse,
                        const float* delta, AttentionProblem p, bool vector_in, bool vector_out,
                        bool add) {
  const AttentionTile at(p.mask.queries, p.heads, kRows, p.mask.causal);
  const AttentionMask mask = p.mask.ForBatch(at.b);
  const int64_t kv_head = at.n / (p.heads / p.kv_heads);
  const int64_t valid = mask.queries - at.first;
  const int64_t first = at.first + 16 * Warp();
  const float scale = static_cast<float>(p.scale) * kLog2E;
  BF16* q_tile = reinterpret_cast<BF16*>(DynamicShared());
  BF16* dout_tile = q_tile + kRows * kStep<kDim>;
  BF16* k_tile = dout_tile + kRows * kStep<kDim>;
  BF16* v_tile = k_tile + kKeys * kStep<kDim>;

  LoadTile<kRows, kDim>(q_tile, q.Row(at.b, at.first, at.n), q.token, valid, p.head_dim, vector_in);
  LoadTile<kRows, kDim>(dout_tile, dout.Row(at.b, at.first, at.n), dout.token, valid, p.head_dim,
                        vector_in);
  CommitCopies();
  float row_lse[2], row_delta[2];  // lse in units of log 2
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + FragmentRow(2 * half);
    const int64_t at_row = p.StatisticsRow(at.b, at.n) + row;
    row_lse[half] = row < mask.queries ? lse[at_row] * kLog2E : 0.0f;
    row_delta[half] = row < mask.queries ? delta[at_row] : 0.0f;
  }
  [[maybe_unused]] __shared__ KeepTile<kRows, kKeys> kept;
  [[maybe_unused]] AttentionKeep keep;
  if constexpr (kDrop) keep = p.keep.ForHead(at.b, at.n);
  float sums[kDim / 8][4] = {};
  const int64_t end = mask.EndKey(at.first + (valid < kRows ? valid : kRows));
  for (int64_t j = mask.FirstKey(at.first); j < end; j += kKeys) {
    LoadTile<kKeys, kDim>(k_tile, k.Row(at.b, j, kv_head), k.token, mask.keys - j, p.head_dim,
                          vector_in);
    LoadTile<kKeys, kDim>(v_tile, v.Row(at.b, j, kv_head), v.token, mask.keys - j, p.head_dim,
                          vector_in);
    CommitCopies();
    if constexpr (kDrop) kept.Draw(keep, at.first, j);
    WaitForCopies<0>();
    __syncthreads();
    float scores[kKeys / 8][4] = {}, dscores[kKeys / 8][4] = {};
    AddProductOfRows<kKeys, kDim>(scores, q_tile + 16 * Warp() * kStep<kDim>, k_tile);
    AddProductOfRows<kKeys, kDim>(dscores, dout_tile + 16 * Warp() * kStep<kDim>, v_tile);
    const bool all = mask.SeesAll(first, first + 16, j, j + kKeys);
#pragma unroll
    for (int t = 0; t < kKeys / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool sees = all || mask.Sees(first + FragmentRow(i), j + 8 * t + FragmentColumn(i));
        if constexpr (kDrop)
          dscores[t][i] *= kept.Keeps(16 * Warp() + FragmentRow(i), 8 * t + FragmentColumn(i))
                               ? static_cast<float>(keep.scale)
                               : 0.0f;
        dscores[t][i] =
            sees ? exp2f(scores[t][i] * scale - row_lse[i / 2]) * (dscores[t][i] - row_delta[i / 2])
                 : 0.0f;
      }
    }
    AddWeightedRows<kKeys, kDim>(sums, dscores, k_tile);
    __syncthreads();  // k and v are used up
  }
  WaitForCopies<0>();  // where there was no key to see
  const float factor[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
  StoreRows<kDim>(dq, at, first, mask.queries, sums, factor, p.head_dim, vector_out, add);
}

// dv = P^T dout and dk = scale dS^T q, summed over the heads that share the kv head, in order. The
// scores are computed transposed, a warp's 16 keys by kQueries.
template <int kDim, int kQueries, bool kDrop, class Out>
__global__ void __launch_bounds__(kThreads)
    KeyGradientKernel(Heads<Out> dk, Heads<Out> dv, Heads<const BF16> dout, Heads<const BF16> q,
                      Heads<const BF16> k, Heads<const BF16> v, const float* lse,
                      const float* delta, AttentionProblem p, bool vector_in, bool vector_out,
                      bool add) {
  static_assert(kQueries <= kThreads);
  const AttentionTile at(p.mask.keys, p.kv_heads, kRows, false);
  const AttentionMask mask = p.mask.ForBatch(at.b);
  const int64_t group = p.heads / p.kv_heads, valid = mask.keys - at.first;
  const int64_t first = at.first + 16 * Warp();
  const float scale = static_cast<float>(p.scale) * kLog2E;
  BF16* k_tile = reinterpret_cast<BF16*>(DynamicShared());
  BF16* v_tile = k_tile + kRows * kStep<kDim>;
  BF16* q_tile = v_tile + kRows * kStep<kDim>;
  BF16* dout_tile = q_tile + kQueries * kStep<kDim>;
  float* lse_tile = reinterpret_cast<float*>(dout_tile + kQueries * kStep<kDim>);
  float* delta_tile = lse_tile + kQueries;

  LoadTile<kRows, kDim>(k_tile, k.Row(at.b, at.first, at.n), k.token, valid, p.head_dim, vector_in);
  LoadTile<kRows, kDim>(v_tile, v.Row(at.b, at.first, at.n), v.token, valid, p.head_dim, vector_in);
  CommitCopies();
  float dk_sums[kDim / 8][4] = {}, dv_sums[kDim / 8][4] = {};
  const int64_t begin = mask.FirstQuery(at.first);
  const int64_t end = mask.EndQuery(at.first + (valid < kRows ? valid : kRows));
  [[maybe_unused]] __shared__ KeepTile<kQueries, kRows> kept;
  [[maybe_unused]] AttentionKeep keep;
  for (int64_t n = at.n * group; n < (at.n + 1) * group; ++n) {
    if constexpr (kDrop) keep = p.keep.ForHead(at.b, n);
    for (int64_t i0 = begin; i0 < end; i0 += kQueries) {
      const int64_t rows = mask.queries - i0;
      LoadTile<kQueries, kDim>(q_tile, q.Row(at.b, i0, n), q.token, rows, p.head_dim, vector_in);
      LoadTile<kQueries, kDim>(dout_tile, dout.Row(at.b, i0, n), dout.token, rows, p.head_dim,
                               vector_in);
      CommitCopies();
      if (threadIdx.x < kQueries) {
        const int64_t row = p.StatisticsRow(at.b, n) + i0 + threadIdx.x;
        lse_tile[threadIdx.x] = threadIdx.x < rows ? lse[row] * kLog2E : 0.0f;
        delta_tile[threadIdx.x] = threadIdx.x < rows ? delta[row] : 0.0f;
      }
      if constexpr (kDrop) kept.Draw(keep, i0, at.first);
      WaitForCopies<0>();
      __syncthreads();
      float scores[kQueries / 8][4] = {}, dscores[kQueries / 8][4] = {};
      AddProductOfRows<kQueries, kDim>(scores, k_tile + 16 * Warp() * kStep<kDim>, q_tile);
      AddProductOfRows<kQueries, kDim>(dscores, v_tile + 16 * Warp() * kStep<kDim>, dout_tile);
      const bool all = mask.SeesAll(i0, i0 + kQueries, first, first + 16);
#pragma unroll
      for (int t = 0; t < kQueries / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * t + FragmentColumn(i);
          const bool sees = all || mask.Sees(i0 + column, first + FragmentRow(i));
          scores[t][i] = sees ? exp2f(scores[t][i] * scale - lse_tile[column]) : 0.0f;
          if constexpr (kDrop) {
            const bool stays = kept.Keeps(column, 16 * Warp() + FragmentRow(i));
            const float dp = stays ? dscores[t][i] * static_cast<float>(keep.scale) : 0.0f;
            dscores[t][i] = scores[t][i] * (dp - delta_tile[column]);
            if (!stays) scores[t][i] = 0;
          } else {
            dscores[t][i] = scores[t][i] * (dscores[t][i] - delta_tile[column]);
          }
        }
      }
      AddWeightedRows<kQueries, kDim>(dv_sums, scores, dout_tile);
      AddWeightedRows<kQueries, kDim>(dk_sums, dscores, q_tile);
      __syncthreads();  // q, dout, lse and delta are used up
    }
  }
  WaitForCopies<0>();  // where no query sees these keys
  const float whole = kDrop ? static_cast<float>(p.keep.scale) : 1.0f;
  const float of_values[2] = {whole, whole};
  const float factor[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
  StoreRows<kDim>(dv, at, first, mask.keys, dv_sums, of_values, p.head_dim, vector_out, add);
  StoreRows<kDim>(dk, at, first, mask.keys, dk_sums, factor, p.head_dim, vector_out, add);
}

template <int kDim>
constexpr size_t TileBytes(int rows) {
  return static_cast<size_t>(rows) * kStep<kDim> * sizeof(BF16);
}

// f(std::integral_constant<int, kDim>, std::bool_constant<kDrop>, TypeTag<Out>) with the head
// dimension rounded up to one that is compiled, and the result's type.
template <class F>
void VisitResult(const AttentionProblem& p, const View& result, F&& f) {
  const auto visit = [&](auto dim, auto drop) {
    if (result.dtype == DType::kBF16)
      f(dim, drop, TypeTag<BF16>());
    else
      f(dim, drop, TypeTag<float>());
  };
  const auto visit_dim = [&](auto dim) {
    if (p.keep.threshold > 0) return visit(dim, std::true_type());
    visit(dim, std::false_type());
  };
  if (p.head_dim <= 64) return visit_dim(std::integral_constant<int, 64>{});
  visit_dim(std::integral_constant<int, 128>{});
}

}  // namespace

bool MmaAttentionApplies(const View& q) {
  return q.dtype == DType::kBF16 && q.dim(3) > 0 && q.dim(3) <= 128;
}

void MmaAttention(const Stream& stream, const char* op, const AttentionArguments& a) {
  const AttentionProblem& p = a.problem;
  const bool vector_in = RowsAligned16(a.q) && RowsAligned16(a.k) && RowsAligned16(a.v);
  VisitResult(p, a.out, [&](auto dim, auto drop, auto out) {
    constexpr int kDim = decltype(dim)::value;
    constexpr bool kDrop = decltype(drop)::value;
    using Out = typename decltype(out)::type;
    Launch(stream, op, (ForwardKernel<kDim, kDrop, Out>),
           GridSize(op, p.batch * p.heads * CeilDiv(p.mask.queries, kRows)), kThreads,
           TileBytes<kDim>(kRows + 2 * kKeys), Heads<Out>(a.out), a.lse.as<float>(),
           Heads<const BF16>(a.q), Heads<const BF16>(a.k), Heads<const BF16>(a.v), p, vector_in,
           RowsAligned16(a.out));
  });
}

void MmaAttentionBackward(const Stream& stream, const char* op,
                          const AttentionBackwardArguments& a) {
  const AttentionProblem& p = a.problem;
  const bool vector_in =
      RowsAligned16(a.q) && RowsAligned16(a.k) && RowsAligned16(a.v) && RowsAligned16(a.dout);
  const Heads<const BF16> dout(a.dout), q(a.q), k(a.k), v(a.v);
  VisitResult(p, a.dq, [&](auto dim, auto drop, auto out) {
    constexpr int kDim = decltype(dim)::value;
    constexpr bool kDrop = decltype(drop)::value;
    using Out = typename decltype(out)::type;
    Launch(stream, op, (QueryGradientKernel<kDim, kDrop, Out>),
           GridSize(op, p.batch * p.heads * CeilDiv(p.mask.queries, kRows)), kThreads,
           TileBytes<kDim>(2 * kRows + 2 * kKeys), Heads<Out>(a.dq), dout, q, k, v,
           a.lse.as<float>(), a.delta.as<float>(), p, vector_in, RowsAligned16(a.dq), a.add);
    // With 128 columns the sums leave no registers for more queries.
    constexpr int kQueries = kDim == 64 ? 64 : 32;
    Launch(stream, op, (KeyGradientKernel<kDim, kQueries, kDrop, Out>),
           GridSize(op, p.batch * p.kv_heads * CeilDiv(p.mask.keys, kRows)), kThreads,
           TileBytes<kDim>(2 * kRows + 2 * kQueries) + 2 * kQueries * sizeof(float),
           Heads<Out>(a.dk), Heads<Out>(a.dv), dout, q, k, v, a.lse.as<float>(),
           a.delta.as<float>(), p, vector_in, RowsAligned16(a.dk) && RowsAligned16(a.dv), a.add);
  });
}

}  // namespace shoal::kernels::cuda
