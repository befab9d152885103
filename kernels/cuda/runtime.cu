#include "kernels/cuda/device_utils.cuh"
#include "kernels/cuda/handles.h"
#include "kernels/cuda_runtime.h"

namespace shoal::kernels::cuda {

void ThrowCudaError(cudaError_t status, const char* op, const char* call, const char* file,
                    int line) {
  cudaGetLastError();  // so that a later call does not report this error again
  throw Error(
      ErrorKind::kBug, op,
      fmt::format("{}: {} ({})", call, cudaGetErrorString(status), cudaGetErrorName(status)), file,
      line);
}

}  // namespace shoal::kernels::cuda

namespace shoal::cuda {
namespace {

constexpr const char* kOp = "cuda runtime";

void Select(int device) { SHOAL_CUDA_CHECK(cudaSetDevice(device), kOp); }

void CopyAsync(void* stream, void* out, const void* data, size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return;
  SHOAL_CUDA_CHECK(cudaMemcpyAsync(out, data, bytes, kind, static_cast<cudaStream_t>(stream)), kOp);
}

}  // namespace

int DeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::string DeviceName(int device) {
  cudaDeviceProp properties;
  SHOAL_CUDA_CHECK(cudaGetDeviceProperties(&properties, device), kOp);
  return properties.name;
}

void* Allocate(int device, size_t bytes) {
  if (bytes == 0) return nullptr;
  Select(device);
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  SHOAL_CUDA_CHECK(status, kOp);
  return data;
}

// Destructors call these two, some of them at the process's end: an error has nowhere to go.
void Free(void* data) { cudaFree(data); }
void DestroyStream(void* stream) { cudaStreamDestroy(static_cast<cudaStream_t>(stream)); }

void* CreateStream(int device) {
  Select(device);
  cudaStream_t stream = nullptr;
  SHOAL_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), kOp);
  return stream;
}

void Synchronize(void* stream) {
  SHOAL_CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), kOp);
  int device = 0;
  SHOAL_CUDA_CHECK(cudaStreamGetDevice(static_cast<cudaStream_t>(stream), &device), kOp);
  kernels::cuda::StateOf(device).ThrowFault();
}

void* Mark(void* stream) {
  cudaEvent_t event = nullptr;
  SHOAL_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), kOp);
  SHOAL_CUDA_CHECK(cudaEventRecord(event, static_cast<cudaStream_t>(stream)), kOp);
  return event;
}

void WaitFor(void* mark) {
  const cudaEvent_t event = static_cast<cudaEvent_t>(mark);
  const cudaError_t status = cudaEventSynchronize(event);
  cudaEventDestroy(event);
  SHOAL_CUDA_CHECK(status, kOp);
}

void CopyToDevice(void* stream, void* device_data, const void* host_data, size_t bytes) {
  CopyAsync(stream, device_data, host_data, bytes, cudaMemcpyHostToDevice);
}

void CopyToHost(void* stream, void* host_data, const void* device_data, size_t bytes) {
  CopyAsync(stream, host_data, device_data, bytes, cudaMemcpyDeviceToHost);
}

}  // namespace shoal::cuda
