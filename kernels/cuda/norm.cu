#include <algorithm>

#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/cuda/reduce.h"
#include "kernels/norm.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kMostThreads = 512;
// Blocks of the backward pass: each leaves one row of partial sums for dweight. The number is part
// of the order of the sum, so it may depend on the shape only.
constexpr int64_t kMostBackwardBlocks = 512;
constexpr size_t kMostPartialShared = 96 << 10;

// One block per row. kLayer: LayerNorm, else RMSNorm (mean and bias are null).
template <class T, bool kLayer>
__global__ void __launch_bounds__(kMostThreads)
    NormKernel(T* out, Accumulator<T>* mean, Accumulator<T>* rstd, const T* x, const T* weight,
               const T* bias, int64_t columns, Accumulator<T> eps, bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  const int64_t row = blockIdx.x, begin = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  const T* xr = x + row * columns;
  T* outr = out + row * columns;
  const auto row_sum = [&](auto term) {
    A sum = 0;
    for (int64_t d = begin; d < columns; d += step) {
      A v[N];
      LoadChunk(v, xr + d, columns - d, vector);
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (d + e < columns) sum += term(v[e]);
    }
    return BlockReduce(sum, A(0), SumOp());
  };
  A m = 0;
  if (kLayer) m = row_sum([](A v) { return v; }) / A(columns);
  const A variance = row_sum([m](A v) { return (v - m) * (v - m); }) / A(columns);
  const A r = A(1) / sqrt(variance + eps);
  if (threadIdx.x == 0) {
    if (kLayer) mean[row] = m;
    rstd[row] = r;
  }
  for (int64_t d = begin; d < columns; d += step) {
    A v[N], w[N], b[N];
    LoadChunk(v, xr + d, columns - d, vector);
    LoadChunk(w, weight + d, columns - d, vector);
    if (kLayer) LoadChunk(b, bias + d, columns - d, vector);
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = (v[e] - m) * r * w[e] + (kLayer ? b[e] : A(0));
    StoreChunk(outr + d, v, columns - d, vector);
  }
}

// Block b takes rows b, b + gridDim.x, ... With g = dy weight and h = (x - mean) rstd:
// dx = rstd (g - mean(g) - h mean(g h)), mean(g) for LayerNorm only. Each thread owns its columns'
// share of dweight (and dbias): in shared memory, where lane follows lane so that banks do not
// collide, or, where the row is too long for that, in place. Block b's share ends in row b of
// `partial` ([blocks, D], dbias [blocks, D] behind it).
template <class T, bool kLayer>
__global__ void __launch_bounds__(kMostThreads)
    NormBackwardKernel(T* dx, bool accumulate_dx, Accumulator<T>* partial, const T* dy, const T* x,
                       const T* weight, const Accumulator<T>* mean, const Accumulator<T>* rstd,
                       int64_t rows, int64_t columns, bool vector, bool in_shared) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * N;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  A* dweight_out = partial + blockIdx.x * columns;
  A* dbias_out = partial + (static_cast<int64_t>(gridDim.x) + blockIdx.x) * columns;
  A* dweight = in_shared ? reinterpret_cast<A*>(DynamicShared()) : dweight_out;
  A* dbias = in_shared ? dweight + CeilDiv(columns, step) * step : dbias_out;
  // Where this thread keeps its share of column d + e, d = begin modulo step.
  const auto slot = [&](int64_t d, int e) {
    return in_shared ? d - begin + static_cast<int64_t>(e) * blockDim.x + threadIdx.x : d + e;
  };
  for (int64_t d = begin; d < columns; d += step) {
    for (int e = 0; e < N && d + e < columns; ++e) {
      dweight[slot(d, e)] = 0;
      if (kLayer) dbias[slot(d, e)] = 0;
    }
  }
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* dyr = dy + row * columns;
    const T* xr = x + row * columns;
    T* dxr = dx + row * columns;
    const A m = kLayer ? mean[row] : A(0), r = rstd[row];
    A sum_g = 0, sum_gh = 0;
    for (int64_t d = begin; d < columns; d += step) {
      A vdy[N], vx[N], vw[N];
      LoadChunk(vdy, dyr + d, columns - d, vector);
      LoadChunk(vx, xr + d, columns - d, vector);
      LoadChunk(vw, weight + d, columns - d, vector);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if (d + e >= columns) continue;
        const A h = (vx[e] - m) * r;
        const A g = vdy[e] * vw[e];
        sum_g += g;
        sum_gh += g * h;
        dweight[slot(d, e)] += vdy[e] * h;
        if (kLayer) dbias[slot(d, e)] += vdy[e];
      }
    }
    const A mean_gh = BlockReduce(sum_gh, A(0), SumOp()) / A(columns);
    const A mean_g = kLayer ? BlockReduce(sum_g, A(0), SumOp()) / A(columns) : A(0);
    for (int64_t d = begin; d < columns; d += step) {
      A vdy[N], vx[N], vw[N];
      LoadChunk(vdy, dyr + d, columns - d, vector);
      LoadChunk(vx, xr + d, columns - d, vector);
      LoadChunk(vw, weight + d, columns - d, vector);
#pragma unroll
      for (int e = 0; e < N; ++e)
        vdy[e] = r * (vdy[e] * vw[e] - mean_g - (vx[e] - m) * r * mean_gh);
      if (accumulate_dx) {
        LoadChunk(vx, dxr + d, columns - d, vector);
#pragma unroll
        for (int e = 0; e < N; ++e) vdy[e] += vx[e];
      }
      StoreChunk(dxr + d, vdy, columns - d, vector);
    }
  }
  if (in_shared) {
    for (int64_t d = begin; d < columns; d += step) {
      for (int e = 0; e < N && d + e < columns; ++e) {
        dweight_out[d + e] = dweight[slot(d, e)];
        if (kLayer) dbias_out[d + e] = dbias[slot(d, e)];
      }
    }
  }
}

template <bool kLayer>
void Forward(const Stream& stream, const char* op, const View& out, const View& mean,
             const View& rstd, const View& x, const View& weight, const View& bias, double eps) {
  CheckRank(op, "x", x, 2);
  const int64_t rows = x.dim(0), columns = x.dim(1);
  const DType statistics = AccumulatorDType(x.dtype);
  CheckDense(op, "x", x, x.shape);
  SHOAL_CHECK(columns > 0, op, "x has shape {}: its rows are empty", x.shape.ToString());
  CheckArray(op, "out", out, x.shape, x.dtype);
  CheckArray(op, "weight", weight, {columns}, x.dtype);
  CheckArray(op, "rstd", rstd, {rows}, statistics);
  if (kLayer) {
    CheckArray(op, "mean", mean, {rows}, statistics);
    CheckArray(op, "bias", bias, {columns}, x.dtype);
  }
  VisitFloat(x.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const bool vector =
        columns % kChunk<T> == 0 && AllAligned16(out.data, x.data, weight.data, bias.data);
    Launch(stream, op, NormKernel<T, kLayer>, GridSize(op, rows),
           RowThreads(columns, kChunk<T>, kMostThreads), 0, out.as<T>(), mean.as<A>(), rstd.as<A>(),
           x.as<T>(), weight.as<T>(), bias.as<T>(), columns, A(eps), vector);
  });
}

template <bool kLayer>
void Backward(const Stream& stream, const char* op, const View& dx, bool accumulate_dx,
              const View& dweight, const View& dbias, bool accumulate_dweight, const View& dy,
              const View& x, const View& weight, const View& mean, const View& rstd) {
  CheckRank(op, "x", x, 2);
  const int64_t rows = x.dim(0), columns = x.dim(1);
  const DType statistics = AccumulatorDType(x.dtype);
  CheckDense(op, "x", x, x.shape);
  SHOAL_CHECK(columns > 0, op, "x has shape {}: its rows are empty", x.shape.ToString());
  CheckArray(op, "dx", dx, x.shape, x.dtype);
  CheckArray(op, "dy", dy, x.shape, x.dtype);
  CheckArray(op, "weight", weight, {columns}, x.dtype);
  CheckArray(op, "rstd", rstd, {rows}, statistics);
  CheckDense(op, "dweight", dweight, {columns});
  if (kLayer) {
    CheckArray(op, "mean", mean, {rows}, statistics);
    CheckDense(op, "dbias", dbias, {columns});
  }
  VisitFloat(x.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    constexpr int kPartials = kLayer ? 2 : 1;
    const int64_t blocks = std::min(rows, kMostBackwardBlocks);
    Scratch scratch(stream, kPartials * blocks * columns * sizeof(A));
    A* partial = scratch.as<A>();
    const bool vector =
        columns % kChunk<T> == 0 && AllAligned16(dx.data, dy.data, x.data, weight.data);
    const int threads = RowThreads(columns, kChunk<T>, kMostThreads);
    const int64_t step = threads * kChunk<T>;
    size_t shared = kPartials * CeilDiv(columns, step) * step * sizeof(A);
    const bool in_shared = shared <= kMostPartialShared;
    if (!in_shared) shared = 0;
    Launch(stream, op, NormBackwardKernel<T, kLayer>, GridSize(op, blocks), threads, shared,
           dx.as<T>(), accumulate_dx, partial, dy.as<T>(), x.as<T>(), weight.as<T>(), mean.as<A>(),
           rstd.as<A>(), rows, columns, vector, in_shared);
    const Dims shape = {blocks, columns};
    SumPartials(stream, op, dweight, View(partial, statistics, shape), accumulate_dweight);
    if (kLayer) {
      SumPartials(stream, op, dbias, View(partial + blocks * columns, statistics, shape),
                  accumulate_dweight);
    }
  });
}

}  // namespace

void RmsNorm(const Stream& stream, const View& out, const View& rstd, const View& x,
             const View& weight, double eps) {
  Forward<false>(stream, "RmsNorm", out, {}, rstd, x, weight, {}, eps);
}

void RmsNormBackward(const Stream& stream, const View& dx, bool accumulate_dx, const View& dweight,
                     bool accumulate_dweight, const View& dy, const View& x, const View& weight,
                     const View& rstd) {
  Backward<false>(stream, "RmsNormBackward", dx, accumulate_dx, dweight, {}, accumulate_dweight, dy,
                  x, weight, {}, rstd);
}

void LayerNorm(const Stream& stream, const View& out, const View& mean, const View& rstd,
               const View& x, const View& weight, const View& bias, double eps) {
  Forward<true>(stream, "LayerNorm", out, mean, rstd, x, weight, bias, eps);
}

void LayerNormBackward(const Stream& stream, const View& dx, bool accumulate_dx,
                       const View& dweight, const View& dbias, bool accumulate_dweight,
                       const View& dy, const View& x, const View& weight, const View& mean,
                       const View& rstd) {
  Backward<true>(stream, "LayerNormBackward", dx, accumulate_dx, dweight, dbias, accumulate_dweight,
                 dy, x, weight, mean, rstd);
}

}  // namespace shoal::kernels::cuda
