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

using kernels::cuda::Handle;

namespace {
constexpr const char* kOp = "cuda runtime";

void Select(int device) { SHOAL_CUDA_CHECK(cudaSetDevice(device), kOp); }

void CopyAsync(const Stream& stream, void* out, const void* data, size_t bytes,
               cudaMemcpyKind kind) {
  if (bytes == 0) return;
  Select(stream.device.index);
  SHOAL_CUDA_CHECK(cudaMemcpyAsync(out, data, bytes, kind, Handle(stream)), kOp);
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

MemoryInfo DeviceMemory(int device) {
  Select(device);
  MemoryInfo info;
  SHOAL_CUDA_CHECK(cudaMemGetInfo(&info.free, &info.total), kOp);
  return info;
}

void* Allocate(int device, size_t bytes) {
  if (bytes == 0) return nullptr;
  Select(device);
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    const MemoryInfo info = DeviceMemory(device);
    SHOAL_FAIL(ErrorKind::kConfig, "gpu memory",
               "device {} has {} of {} bytes free and {} more were asked for; take a smaller "
               "batch.micro, memory.recompute, or a higher zero.stage",
               device, info.free, info.total, bytes);
  }
  SHOAL_CUDA_CHECK(status, kOp);
  return data;
}

void Free(int device, void* data) {
  if (!data) return;
  Select(device);
  SHOAL_CUDA_CHECK(cudaFree(data), kOp);
}

void* AllocatePinned(int device, size_t bytes) {
  if (bytes == 0) return nullptr;
  Select(device);
  void* data = nullptr;
  SHOAL_CUDA_CHECK(cudaHostAlloc(&data, bytes, cudaHostAllocPortable), kOp);
  return data;
}

void FreePinned(int device, void* data) {
  if (!data) return;
  Select(device);
  SHOAL_CUDA_CHECK(cudaFreeHost(data), kOp);
}

void* CreateStream(int device) {
  Select(device);
  cudaStream_t stream = nullptr;
  SHOAL_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), kOp);
  return stream;
}

void DestroyStream(int device, void* stream) {
  Select(device);
  SHOAL_CUDA_CHECK(cudaStreamDestroy(static_cast<cudaStream_t>(stream)), kOp);
}

void Synchronize(const Stream& stream) {
  Select(stream.device.index);
  SHOAL_CUDA_CHECK(cudaStreamSynchronize(Handle(stream)), kOp);
  kernels::cuda::StateOf(stream.device.index).ThrowFault();
}

void CopyToDevice(const Stream& stream, void* device_data, const void* host_data, size_t bytes) {
  CopyAsync(stream, device_data, host_data, bytes, cudaMemcpyHostToDevice);
}

void CopyToHost(const Stream& stream, void* host_data, const void* device_data, size_t bytes) {
  CopyAsync(stream, host_data, device_data, bytes, cudaMemcpyDeviceToHost);
}

void CopyOnDevice(const Stream& stream, void* out, const void* data, size_t bytes) {
  CopyAsync(stream, out, data, bytes, cudaMemcpyDeviceToDevice);
}

void* CreateEvent(int device) {
  Select(device);
  cudaEvent_t event = nullptr;
  SHOAL_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), kOp);
  return event;
}

void DestroyEvent(int device, void* event) {
  Select(device);
  SHOAL_CUDA_CHECK(cudaEventDestroy(static_cast<cudaEvent_t>(event)), kOp);
}

void Record(const Stream& stream, void* event) {
  Select(stream.device.index);
  SHOAL_CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(event), Handle(stream)), kOp);
}

void Wait(const Stream& stream, void* event) {
  Select(stream.device.index);
  SHOAL_CUDA_CHECK(cudaStreamWaitEvent(Handle(stream), static_cast<cudaEvent_t>(event), 0), kOp);
}

}  // namespace shoal::cuda
