#include "kernels/contract.h"
#include "kernels/cuda/device_utils.cuh"
#include "kernels/reduce_arrays.h"

namespace shoal::kernels::cuda {
namespace {

constexpr int kThreads = 256;

template <class T, bool kLargest>
__global__ void ReduceInOrderKernel(T* out, const T* x, int64_t arrays, int64_t apart, int64_t n,
                                    bool vector) {
  using A = Accumulator<T>;
  constexpr int N = kChunk<T>;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (at >= n) return;
  A result[N];
  LoadChunk(result, x + at, n - at, vector);
#pragma unroll 4
  for (int64_t p = 1; p < arrays; ++p) {
    A v[N];
    LoadChunk(v, x + p * apart + at, n - at, vector);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (kLargest) {
        result[e] = result[e] >= v[e] || result[e] != result[e] ? result[e] : v[e];
      } else {
        result[e] += v[e];
      }
    }
  }
  StoreChunk(out + at, result, n - at, vector);
}

}  // namespace

void ReduceInOrder(const Stream& stream, ReduceOp op, const View& out, const View& x) {
  const char* name = "ReduceInOrder";
  CheckRows(name, out, x);
  VisitFloat(x.dtype, name, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t n = out.numel(), apart = x.strides[0];
    const bool vector = apart % kChunk<T> == 0 && IsAligned16(x.data) && IsAligned16(out.data);
    const auto kernel =
        op == ReduceOp::kMax ? ReduceInOrderKernel<T, true> : ReduceInOrderKernel<T, false>;
    Launch(stream, name, kernel, GridSize(name, CeilDiv(n, kThreads * kChunk<T>)), kThreads, 0,
           out.as<T>(), x.as<T>(), x.dim(0), apart, n, vector);
  });
}

}  // namespace shoal::kernels::cuda
