// The few calls of the CUDA runtime that other folders need, without its headers. Only defined in a
// build with CUDA: call them under `if constexpr (kHaveCuda)`.
#pragma once

#include <cstddef>
#include <string>

namespace shoal::cuda {

int DeviceCount();  // 0 without a driver or a device; never fails
std::string DeviceName(int device);
void* Allocate(int device, size_t bytes);  // null when the device's memory is exhausted
void Free(void* data);
void* CreateStream(int device);  // a cudaStream_t
void DestroyStream(void* stream);
// Throws what earlier kernels of the stream ran into. Here the errors surface that only the device
// can see: for a token id or a label out of range the kernel wrote NaN, and this throws
// Error(kData).
void Synchronize(void* stream);
// What is queued on the stream so far, for WaitFor to wait for its end; each is waited for once.
void* Mark(void* stream);
void WaitFor(void* mark);
// Queued on the stream. Host memory is pageable: to the host they have finished on return.
void CopyToDevice(void* stream, void* device_data, const void* host_data, size_t bytes);
void CopyToHost(void* stream, void* host_data, const void* device_data, size_t bytes);

}  // namespace shoal::cuda
