#include <limits>

#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/softmax.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kMostThreads = 512;

// f(d, v) for every chunk of this thread's share of a row.
template <class T, class F>
__device__ __forceinline__ void ForChunks(const T* row, int64_t columns, bool vector, F&& f) {
  constexpr int N = kChunk<T>;
  const int64_t step = static_cast<int64_t>(blockDim.x) * N;
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * N; d < columns; d += step) {
    Accumulator<T> v[N];
    LoadChunk(v, row + d, columns - d, vector);
    f(d, v);
  }
}

// One block per row. out may alias x: each thread writes only what it alone reads.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    SoftmaxKernel(T* out, const T* x, int64_t columns, bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  const T* xr = x + blockIdx.x * columns;
  T* outr = out + blockIdx.x * columns;
  A highest = -std::numeric_limits<A>::infinity();
  ForChunks(xr, columns, vector, [&](int64_t d, A(&v)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (d + e < columns) highest = MaxOp()(highest, v[e]);
  });
  highest = BlockReduce(highest, -std::numeric_limits<A>::infinity(), MaxOp());
  A sum = 0;
  ForChunks(xr, columns, vector, [&](int64_t d, A(&v)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (d + e < columns) sum += exp(v[e] - highest);
  });
  const A scale = A(1) / BlockReduce(sum, A(0), SumOp());
  ForChunks(xr, columns, vector, [&](int64_t d, A(&v)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = exp(v[e] - highest) * scale;
    StoreChunk(outr + d, v, columns - d, vector);
  });
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    SoftmaxBackwardKernel(T* dx, const T* dy, const T* out, int64_t columns, bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  const T* dyr = dy + blockIdx.x * columns;
  const T* outr = out + blockIdx.x * columns;
  T* dxr = dx + blockIdx.x * columns;
  A dot = 0;
  ForChunks(dyr, columns, vector, [&](int64_t d, A(&v)[N]) {
    A p[N];
    LoadChunk(p, outr + d, columns - d, vector);
#pragma unroll
    for (int e = 0; e < N; ++e) dot += v[e] * p[e];
  });
  dot = BlockReduce(dot, A(0), SumOp());
  ForChunks(dyr, columns, vector, [&](int64_t d, A(&v)[N]) {
    A p[N];
    LoadChunk(p, outr + d, columns - d, vector);
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = p[e] * (v[e] - dot);
    StoreChunk(dxr + d, v, columns - d, vector);
  });
}

}  // namespace

void Softmax(const Stream& stream, const View& out, const View& x) {
  const char* op = "Softmax";
  CheckRank(op, "x", x, 2);
  CheckDense(op, "x", x, x.shape);
  CheckArray(op, "out", out, x.shape, x.dtype);
  const int64_t rows = x.dim(0), columns = x.dim(1);
  VisitFloat(x.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Launch(stream, op, SoftmaxKernel<T>, GridSize(op, rows),
           RowThreads(columns, kChunk<T>, kMostThreads), 0, out.as<T>(), x.as<T>(), columns,
           columns % kChunk<T> == 0 && AllAligned16(out.data, x.data));
  });
}

void SoftmaxBackward(const Stream& stream, const View& dx, const View& dy, const View& out) {
  const char* op = "SoftmaxBackward";
  CheckRank(op, "out", out, 2);
  CheckDense(op, "out", out, out.shape);
  CheckArray(op, "dy", dy, out.shape, out.dtype);
  CheckArray(op, "dx", dx, out.shape, out.dtype);
  const int64_t rows = out.dim(0), columns = out.dim(1);
  VisitFloat(out.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Launch(stream, op, SoftmaxBackwardKernel<T>, GridSize(op, rows),
           RowThreads(columns, kChunk<T>, kMostThreads), 0, dx.as<T>(), dy.as<T>(), out.as<T>(),
           columns, columns % kChunk<T> == 0 && AllAligned16(dx.data, dy.data, out.data));
  });
}

}  // namespace shoal::kernels::cuda
