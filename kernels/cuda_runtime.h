// The few calls of the CUDA runtime that other folders need, without its headers. Only defined in a
// build with CUDA: call them under `if constexpr (kHaveCuda)`.
#pragma once

#include <cstddef>

namespace shoal::cuda {

int DeviceCount();                         // 0 without a driver or a device; never fails
void* Allocate(int device, size_t bytes);  // null when the device's memory is exhausted
void Free(void* data);
void* CreateStream(int device);  // a cudaStream_t
void DestroyStream(void* stream);
void Synchronize(void* stream);  // throws what earlier kernels of the stream ran into
// Queued on the stream. Host memory is pageable: to the host they have finished on return.
void CopyToDevice(void* stream, void* device_data, const void* host_data, size_t bytes);
void CopyToHost(void* stream, void* host_data, const void* device_data, size_t bytes);

}  // namespace shoal::cuda
