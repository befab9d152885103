// Enough of CUDA to compile kernels/cuda/*.cu with a C++ compiler and to run them on a CPU, one
// block after the other. A thread of a block is a fibre of its own, which runs until it meets a
// barrier or a warp's exchange; who runs next is shuffled, so that a missing barrier gives wrong
// values instead of going unnoticed. The device's memory is the host's, but locked while nothing of
// the device runs: host code that looks at it ends the program, as it would on a machine with a
// GPU. Ranks that are threads share the device, one kernel at a time.
#pragma once
#pragma GCC system_header  // its names are not ours to choose

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <type_traits>

#define SHOAL_CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_emulation {

void BlockBarrier();
void WarpBarrier();  // of all 32 lanes of the current thread's warp
unsigned char* DynamicSharedMemory();
// Each lane of the warp brings `mine`; the last to come calls f with all of them, by lane.
using Lanes = void* [32];
void WarpTogether(void* mine, void (*f)(Lanes& all));
// Asynchronous copies to shared memory of 16 bytes from `from`, or of zeros where it is null. One
// happens when it is started or when it is waited for, as a coin falls: whoever reads too early or
// overwrites too early is found out, and so is a thread that ends without having waited.
void StartCopy(void* to, const void* from);
void CloseCopyGroup();
void WaitForCopyGroups(int pending);
// Device memory. A scope of the second may look at it; others wait meanwhile.
void* AllocateDevice(size_t bytes);
void FreeDevice(void* data);
bool OnDevice(const void* data);
class DeviceAccess {
 public:
  DeviceAccess();
  ~DeviceAccess();
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;
};
// Runs `thread` for every thread of every block.
void Run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);

}  // namespace cuda_emulation

// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline int EmulatedLane() { return static_cast<int>(threadIdx.x % 32); }

inline void __syncthreads() { cuda_emulation::BlockBarrier(); }
inline void __syncwarp() { cuda_emulation::WarpBarrier(); }
inline void __threadfence_system() {}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  struct Lane {
    T value, result;
    int from;
  } mine = {value, value, lane};
  cuda_emulation::WarpTogether(&mine, [](cuda_emulation::Lanes& all) {
    for (void* p : all) {
      Lane& to = *static_cast<Lane*>(p);
      to.result = static_cast<Lane*>(all[to.from])->value;
    }
  });
  return mine.result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, EmulatedLane() ^ lanes);
}
inline unsigned __match_any_sync(unsigned, int value) {
  struct Lane {
    int value;
    unsigned same;
  } mine = {value, 0};
  cuda_emulation::WarpTogether(&mine, [](cuda_emulation::Lanes& all) {
    for (void* p : all)
      for (int i = 0; i < 32; ++i)
        if (static_cast<Lane*>(all[i])->value == static_cast<Lane*>(p)->value)
          static_cast<Lane*>(p)->same |= 1u << i;
  });
  return mine.same;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __int_as_float(int bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
template <class T>
T atomicCAS(T* address, T compare, T value) {
  const T before = *address;
  if (before == compare) *address = value;
  return before;
}

// The runtime library ---------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaHostAllocPortable = 1, cudaStreamNonBlocking = 1 };
using cudaStream_t = struct EmulatedStream*;
struct cudaDeviceProp {
  char name[256];
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaEmulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  strcpy(properties->name, "emulated on the CPU");
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 99 << 10;  // the least of the architectures that the code is built for
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = cuda_emulation::AllocateDevice(bytes);
  return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* data) {
  cuda_emulation::FreeDevice(data);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  *data = aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeHost(void* data) {
  free(data);
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = static_cast<cudaStream_t>(malloc(1));
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  free(stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  const cuda_emulation::DeviceAccess access;
  memset(data, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* out, const void* data, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t) {
  // What is said to be the host's must be (tests of kernels give host memory as the device's).
  if ((kind == cudaMemcpyDeviceToHost && cuda_emulation::OnDevice(out)) ||
      (kind == cudaMemcpyHostToDevice && cuda_emulation::OnDevice(data)))
    return cudaErrorInvalidValue;
  const cuda_emulation::DeviceAccess access;
  memcpy(out, data, bytes);
  return cudaSuccess;
}

using cudaEvent_t = struct EmulatedEvent*;
enum { cudaEventDisableTiming = 2 };
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = static_cast<cudaEvent_t>(malloc(1));
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->gridDim.y > 65535 || config->gridDim.z > 65535 || config->blockDim.x > 1024)
    return cudaErrorInvalidValue;
  cuda_emulation::Run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                      [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}

// In kernels/cuda/device_utils.cuh where CUDA is.
namespace shoal::kernels::cuda {
inline unsigned char* DynamicShared() { return ::cuda_emulation::DynamicSharedMemory(); }
}  // namespace shoal::kernels::cuda
