// What every CUDA kernel shares: launching, conversion between storage and arithmetic types,
// vector access and reductions in a fixed order.
//
// Kernels are launched through Launch() only and use no syntax beyond the qualifiers, so that the
// same sources also run on a CPU (tests/kernels/cuda_emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/base/dtype.h"
#include "core/base/stream.h"
#include "core/base/view.h"

// SHOAL_CUDA_CHECK(cudaMemcpyAsync(...), "copy");
#define SHOAL_CUDA_CHECK(call, op)                                                           \
  do {                                                                                       \
    const cudaError_t shoal_status = (call);                                                 \
    if (shoal_status != cudaSuccess) [[unlikely]]                                            \
      ::shoal::kernels::cuda::ThrowCudaError(shoal_status, (op), #call, __FILE__, __LINE__); \
  } while (false)

namespace shoal::kernels::cuda {

[[noreturn]] void ThrowCudaError(cudaError_t status, const char* op, const char* call,
                                 const char* file, int line);

inline cudaStream_t Handle(const Stream& stream) {
  return static_cast<cudaStream_t>(stream.handle);
}

// More than 48 KiB of shared memory, a kernel's static part included, has to be asked for.
inline constexpr size_t kFreeSharedBytes = 32 << 10;

// Queues kernel<<<grid, threads, shared>>>(arguments...) on the stream and its device. An empty
// grid is no work.
template <class... Parameters, class... Arguments>
void Launch(const Stream& stream, const char* op, void (*kernel)(Parameters...), dim3 grid,
            int threads, size_t shared, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  SHOAL_CUDA_CHECK(cudaSetDevice(stream.device.index), op);
  if (shared > kFreeSharedBytes) {
    SHOAL_CUDA_CHECK(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        op);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = Handle(stream);
  SHOAL_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), op);
}

inline void ZeroAsync(const Stream& stream, const char* op, void* data, size_t bytes) {
  if (bytes == 0) return;
  SHOAL_CUDA_CHECK(cudaSetDevice(stream.device.index), op);
  SHOAL_CUDA_CHECK(cudaMemsetAsync(data, 0, bytes, Handle(stream)), op);
}

// The shared memory that a launch asked for.
#ifndef SHOAL_CUDA_EMULATION
__device__ __forceinline__ unsigned char* DynamicShared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}
#endif

__host__ __device__ constexpr int64_t CeilDiv(int64_t n, int64_t d) { return (n + d - 1) / d; }

inline unsigned GridSize(const char* op, int64_t blocks) {
  SHOAL_CHECK(blocks <= 0x7fffffff, op, "{} blocks are more than a grid holds", blocks);
  return static_cast<unsigned>(blocks);
}

// ---------------------------------------------------------------------------------------------
// Storage <-> arithmetic

template <class A, class T>
__device__ __forceinline__ A Widen(T x) {
  return static_cast<A>(x);
}

template <class T, class A>
__device__ __forceinline__ T NarrowTo(A x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, BF16>) {  // the instruction rounds to nearest even, as BF16 does
    BF16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(static_cast<float>(x)));
    return y;
  }
#endif
  return static_cast<T>(x);
}

// An operand whose floating dtype is known at run time only. The branch is the same for all
// threads, and saves an instantiation per combination of dtypes.
struct AnyPointer {
  void* data = nullptr;
  DType dtype = DType::kF32;

  AnyPointer() = default;
  explicit AnyPointer(const View& view) : data(view.data), dtype(view.dtype) {}
};

template <class F>
__device__ __forceinline__ void VisitAnyPointer(AnyPointer p, F&& f) {
  switch (p.dtype) {
    case DType::kF64:
      return f(static_cast<double*>(p.data));
    case DType::kF32:
      return f(static_cast<float*>(p.data));
    default:
      return f(static_cast<BF16*>(p.data));
  }
}

template <class A>
__device__ __forceinline__ A LoadAny(AnyPointer p, int64_t i) {
  A x{};
  VisitAnyPointer(p, [&](auto* data) { x = Widen<A>(data[i]); });
  return x;
}

template <class A>
__device__ __forceinline__ void StoreAny(AnyPointer p, int64_t i, A x) {
  VisitAnyPointer(
      p, [&](auto* data) { data[i] = NarrowTo<std::remove_reference_t<decltype(*data)>>(x); });
}

// ---------------------------------------------------------------------------------------------
// Chunks: the run of elements that a thread moves at once, 16 bytes of the narrowest type.

template <class T>
inline constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
inline constexpr int kAnyChunk = 8;

inline bool IsAligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }
template <class... Pointers>
bool AllAligned16(const Pointers*... p) {
  return (IsAligned16(p) && ...);
}

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T v[N];
};

// v = p[0, count), zeros above. `vector` promises that p is at a 16-byte boundary.
template <int N, class A, class T>
__device__ __forceinline__ void LoadChunk(A (&v)[N], const T* p, int64_t count, bool vector) {
  if (vector && count >= N) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = Widen<A>(pack.v[e]);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = e < count ? Widen<A>(p[e]) : A(0);
  }
}

template <int N, class A, class T>
__device__ __forceinline__ void StoreChunk(T* p, const A (&v)[N], int64_t count, bool vector) {
  if (vector && count >= N) {
    Pack<T, N> pack;
#pragma unroll
    for (int e = 0; e < N; ++e) pack.v[e] = NarrowTo<T>(v[e]);
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < count) p[e] = NarrowTo<T>(v[e]);
  }
}

template <int N, class A>
__device__ __forceinline__ void LoadChunkAny(A (&v)[N], AnyPointer p, int64_t offset, int64_t count,
                                             bool vector) {
  VisitAnyPointer(p, [&](auto* data) { LoadChunk<N>(v, data + offset, count, vector); });
}

template <int N, class A>
__device__ __forceinline__ void StoreChunkAny(AnyPointer p, int64_t offset, const A (&v)[N],
                                              int64_t count, bool vector) {
  VisitAnyPointer(p, [&](auto* data) { StoreChunk<N>(data + offset, v, count, vector); });
}

// ---------------------------------------------------------------------------------------------
// Reductions. The order depends on the number of threads only, which the callers derive from the
// shape: results are the same on every run.

struct SumOp {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
// NaN if either is.
struct MaxOp {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a > b || a != a ? a : b;
  }
};

template <class A, class Op>
__device__ __forceinline__ A WarpReduce(A x, Op op) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// Over a block of whole warps; every thread gets the result.
template <class A, class Op>
__device__ A BlockReduce(A x, A identity, Op op) {
  __shared__ A partial[32];
  x = WarpReduce(x, op);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  __syncthreads();  // an earlier call's readers are done
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return WarpReduce(lane < warps ? partial[lane] : identity, op);
}

// Threads of a block that works on one row of `columns` elements, `chunk` at a time.
constexpr int RowThreads(int64_t columns, int chunk, int most) {
  int threads = 32;
  while (threads < most && static_cast<int64_t>(threads) * chunk < columns) threads *= 2;
  return threads;
}

// Quotient and remainder; 64-bit division is slow and seldom needed.
__host__ __device__ __forceinline__ int64_t DivMod(int64_t n, int64_t d, int64_t* remainder) {
  if (((n | d) >> 32) == 0) {
    const uint32_t q = static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
    *remainder = n - static_cast<int64_t>(q) * d;
    return q;
  }
  const int64_t q = n / d;
  *remainder = n - q * d;
  return q;
}

}  // namespace shoal::kernels::cuda
