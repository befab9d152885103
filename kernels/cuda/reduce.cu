#include <algorithm>

#include "kernels/cuda/checks.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/cuda/reduce.h"
#include "kernels/reduce.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostPartials = 1024;

// partial[b] = sum of block b's share of x (of x^2). The shares depend on n only.
template <class T, bool kSquares>
__global__ void SumKernel(double* partial, const T* x, int64_t n, bool vector) {
  constexpr int N = kChunk<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * N;
  double sum = 0;
  for (int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; begin < n;
       begin += step) {
    double v[N];
    LoadChunk(v, x + begin, n - begin, vector);
#pragma unroll
    for (int e = 0; e < N; ++e) sum += kSquares ? v[e] * v[e] : v[e];
  }
  sum = BlockReduce(sum, 0.0, SumOp());
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void SumOfPartialsKernel(double* out, const double* partial, int count) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = BlockReduce(sum, 0.0, SumOp());
  if (threadIdx.x == 0) *out = sum;
}

template <bool kSquares>
void SumAll(const Stream& stream, const char* op, const View& out, const View& x) {
  CheckArray(op, "out", out, {1}, DType::kF64);
  CheckDense(op, "x", x, x.shape);
  const int64_t n = x.numel();
  VisitFloat(x.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int count =
        static_cast<int>(std::min<int64_t>(CeilDiv(n, kThreads * kChunk<T>), kMostPartials));
    Scratch partial(stream, count * sizeof(double));
    Launch(stream, op, SumKernel<T, kSquares>, dim3(count), kThreads, 0, partial.as<double>(),
           x.as<T>(), n, IsAligned16(x.data));
    Launch(stream, op, SumOfPartialsKernel, dim3(1), kThreads, 0, out.as<double>(),
           partial.as<double>(), count);
  });
}

// partial [splits, N]: row s holds the column sums of rows [s * share, (s + 1) * share) of x.
template <class T>
__global__ void SumRowsKernel(Accumulator<T>* partial, const T* x, int64_t rows, int64_t columns,
                              int64_t share, bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= columns) return;
  const int64_t begin = blockIdx.y * share;
  const int64_t end = begin + share < rows ? begin + share : rows;
  A sum[N] = {};
#pragma unroll 4
  for (int64_t row = begin; row < end; ++row) {
    A v[N];
    LoadChunk(v, x + row * columns + column, columns - column, vector);
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] += v[e];
  }
  StoreChunk(partial + blockIdx.y * columns + column, sum, columns - column, false);
}

// A block has kLanes columns and kGroups groups of partial rows: g, g + kGroups, ...
constexpr int kLanes = 32, kGroups = 16;

template <class A>
__global__ void __launch_bounds__(kLanes* kGroups)
    SumPartialsKernel(AnyPointer out, const A* partial, int64_t count, int64_t columns,
                      bool accumulate) {
  __shared__ A group_sum[kGroups][kLanes];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  A sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t i = group; i < count; i += kGroups) sum += partial[i * columns + column];
  }
  group_sum[group][lane] = sum;
  __syncthreads();
  if (group != 0 || column >= columns) return;
  for (int g = 1; g < kGroups; ++g) sum += group_sum[g][lane];
  if (accumulate) sum += LoadAny<A>(out, column);
  StoreAny(out, column, sum);
}

}  // namespace

void SumPartials(const Stream& stream, const char* op, const View& out, const View& partials,
                 bool accumulate) {
  CheckDense(op, "the sum", out, {partials.dim(1)});
  CheckComputeDType(op, "the sum", out);
  const auto launch = [&](auto tag) {
    using A = typename decltype(tag)::type;
    const int64_t columns = out.dim(0);
    Launch(stream, op, SumPartialsKernel<A>, GridSize(op, CeilDiv(columns, kLanes)),
           kLanes * kGroups, 0, AnyPointer(out), partials.as<A>(), partials.dim(0), columns,
           accumulate);
  };
  if (partials.dtype == DType::kF64)
    launch(TypeTag<double>{});
  else
    launch(TypeTag<float>{});
}

void Sum(const Stream& stream, const View& out, const View& x) {
  SumAll<false>(stream, "Sum", out, x);
}

void SumSquares(const Stream& stream, const View& out, const View& x) {
  SumAll<true>(stream, "SumSquares", out, x);
}

void SumRows(const Stream& stream, const View& out, const View& x, bool accumulate) {
  const char* op = "SumRows";
  CheckRank(op, "x", x, 2);
  CheckDense(op, "x", x, x.shape);
  const int64_t rows = x.dim(0), columns = x.dim(1);
  // Enough blocks to fill a machine, yet a number that the shape alone decides.
  const int64_t splits = std::clamp<int64_t>(CeilDiv(rows, 16), 1, kMostPartials);
  VisitFloat(x.dtype, op, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulator<T>;
    const int threads = RowThreads(columns, kChunk<T>, kThreads);
    Scratch partial(stream, splits * columns * sizeof(A));
    Launch(stream, op, SumRowsKernel<T>,
           dim3(GridSize(op, CeilDiv(columns, threads * kChunk<T>)), static_cast<unsigned>(splits)),
           threads, 0, partial.as<A>(), x.as<T>(), rows, columns, CeilDiv(rows, splits),
           columns % kChunk<T> == 0 && IsAligned16(x.data));
    SumPartials(stream, op, out, View(partial.as<A>(), DTypeOf<A>::value, {splits, columns}),
                accumulate);
  });
}

}  // namespace shoal::kernels::cuda
