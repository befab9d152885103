// f64 products: packed panels and a register tile (Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication", TOMS 2008). K is cut into blocks of a fixed size and
// every element of d is summed in the order of k, whatever the tiles and the number of threads.
#include <omp.h>

#include <algorithm>

#include "core/base/thread_count.h"
#include "kernels/cpu/matmul_internal.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/matmul_f64.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F64 = hn::CappedTag<double, 8>;

// Register tile: kTileRows rows of kTileVectors vectors. AVX-512 has 32 registers, AVX2 16.
#if HWY_TARGET == HWY_AVX3
constexpr int64_t kTileRows = 8;
#else
constexpr int64_t kTileRows = 4;
#endif
constexpr int64_t kTileVectors = 3;
constexpr int64_t kBlockK = 256;

int64_t TileColumns() { return kTileVectors * static_cast<int64_t>(hn::Lanes(F64())); }

// to [ceil(rows / tile)][k][tile]: panels of `tile` rows, k outermost inside a panel, zeros past
// the end.
void Pack(double* HWY_RESTRICT to, const double* HWY_RESTRICT from, int64_t rows, int64_t k,
          int64_t row_step, int64_t k_step, int64_t tile) {
  for (int64_t r = 0; r < rows; r += tile, to += tile * k) {
    const int64_t count = std::min(tile, rows - r);
    const double* base = from + r * row_step;
    if (row_step == 1) {
      for (int64_t l = 0; l < k; ++l)
        for (int64_t i = 0; i < tile; ++i)
          to[l * tile + i] = i < count ? base[l * k_step + i] : 0.0;
      continue;
    }
    for (int64_t i = 0; i < tile; ++i) {
      if (i >= count) {
        for (int64_t l = 0; l < k; ++l) to[l * tile + i] = 0.0;
        continue;
      }
      const double* row = base + i * row_step;
      for (int64_t l = 0; l < k; ++l) to[l * tile + i] = row[l * k_step];
    }
  }
}

// d [kTileRows, tile columns] (+)= a panel times b panel over k.
template <bool kAdd>
HWY_INLINE void Tile(double* HWY_RESTRICT d, int64_t d_row, const double* HWY_RESTRICT a,
                     const double* HWY_RESTRICT b, int64_t k) {
  const F64 f64;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f64));
  using V = hn::Vec<F64>;
  V sum[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
    for (int64_t j = 0; j < kTileVectors; ++j) sum[i][j] = hn::Zero(f64);
  for (int64_t l = 0; l < k; ++l) {
    V row[kTileVectors];
#pragma GCC unroll 8
    for (int64_t j = 0; j < kTileVectors; ++j) row[j] = hn::Load(f64, b + j * lanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      const V left = hn::Set(f64, a[i]);
#pragma GCC unroll 8
      for (int64_t j = 0; j < kTileVectors; ++j) sum[i][j] = hn::MulAdd(left, row[j], sum[i][j]);
    }
    a += kTileRows;
    b += kTileVectors * lanes;
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kTileVectors; ++j) {
      double* at = d + i * d_row + j * lanes;
      hn::StoreU(kAdd ? hn::Add(sum[i][j], hn::LoadU(f64, at)) : sum[i][j], f64, at);
    }
  }
}

// One block of d, [m, n], with `packed_a` and `packed_b` of this thread.
void Block(const Product& p, double* d, const double* a, const double* b, const double* bias,
           int64_t m, int64_t n, double* packed_a, double* packed_b) {
  const int64_t tile_columns = TileColumns();
  for (int64_t k = 0; k < p.k; k += kBlockK) {
    const int64_t kc = std::min(kBlockK, p.k - k);
    const bool add = k > 0 || p.accumulate;
    Pack(packed_a, a + k * p.a_column, m, kc, p.a_row, p.a_column, kTileRows);
    Pack(packed_b, b + k * p.b_row, n, kc, p.b_column, p.b_row, tile_columns);
    for (int64_t j = 0; j < n; j += tile_columns) {
      const double* b_panel = packed_b + j * kc;
      for (int64_t i = 0; i < m; i += kTileRows) {
        const double* a_panel = packed_a + i * kc;
        double* to = d + i * p.d_row + j;
        const int64_t rows = std::min(kTileRows, m - i), columns = std::min(tile_columns, n - j);
        if (rows == kTileRows && columns == tile_columns) {
          if (add)
            Tile<true>(to, p.d_row, a_panel, b_panel, kc);
          else
            Tile<false>(to, p.d_row, a_panel, b_panel, kc);
          continue;
        }
        double edge[kTileRows * kTileVectors * 8];
        Tile<false>(edge, tile_columns, a_panel, b_panel, kc);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) {
            const double value = edge[r * tile_columns + c];
            double& at = to[r * p.d_row + c];
            at = add ? value + at : value;
          }
        }
      }
    }
  }
  if (!bias) return;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) d[i * p.d_row + j] += bias[j];
}

void Multiply(const Stream& stream, const Product& p) {
  // Enough blocks for every thread, and none so small that packing outweighs it.
  constexpr int64_t kMaxRows = 192, kMinRows = 48;
  const int64_t tile_columns = TileColumns();
  const int64_t max_columns = 16 * tile_columns;
  const bool small = p.batch * p.m * p.n * p.k < 50'000;
  const int64_t threads = small ? 1 : KernelThreads();
  const int64_t column_blocks = (p.n + max_columns - 1) / max_columns;
  auto round = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile * tile; };
  const int64_t columns = round((p.n + column_blocks - 1) / column_blocks, tile_columns);
  const int64_t wanted = std::max<int64_t>(1, threads / (p.batch * column_blocks));
  const int64_t parts =
      std::max(std::min(wanted, (p.m + kMinRows - 1) / kMinRows), (p.m + kMaxRows - 1) / kMaxRows);
  const int64_t rows = round((p.m + parts - 1) / parts, kTileRows);
  const int64_t row_blocks = (p.m + rows - 1) / rows;
  const int64_t blocks = p.batch * row_blocks * column_blocks;
  const int team = blocks == 1 ? 1 : static_cast<int>(threads);
  const int64_t kc = std::min(p.k, kBlockK);
  const int64_t per_thread = round(rows * kc, 8) + round(columns * kc, 8);
  const Scratch scratch(stream, sizeof(double) * static_cast<size_t>(per_thread * team));
  if (stream.counting()) return;
  const double* a = static_cast<const double*>(p.a);
  const double* b = static_cast<const double*>(p.b);
  const double* bias = static_cast<const double*>(p.bias);
  double* d = static_cast<double*>(p.d);
  auto run = [&](int64_t block, int64_t thread) {
    const int64_t z = block / (row_blocks * column_blocks);
    const int64_t m = block / column_blocks % row_blocks * rows;
    const int64_t n = block % column_blocks * columns;
    double* packed = scratch.as<double>() + thread * per_thread;
    Block(p, d + z * p.d_batch + m * p.d_row + n, a + z * p.a_batch + m * p.a_row,
          b + z * p.b_batch + n * p.b_column, bias ? bias + n : nullptr, std::min(rows, p.m - m),
          std::min(columns, p.n - n), packed, packed + round(rows * kc, 8));
  };
  if (team == 1) {
    for (int64_t block = 0; block < blocks; ++block) run(block, 0);
    return;
  }
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t block = 0; block < blocks; ++block) run(block, omp_get_thread_num());
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {

HWY_EXPORT(Multiply);
void MatmulF64(const Stream& stream, const Product& p) {
  HWY_DYNAMIC_DISPATCH(Multiply)(stream, p);
}

}  // namespace shoal::kernels::cpu
#endif
