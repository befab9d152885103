// The order in which kernels run, and where they take scratch memory from.
#pragma once

#include <cstddef>

#include "core/base/device.h"
#include "core/base/kernel_profile.h"

namespace shoal {

// Scratch memory for the time of one kernel. The core's allocator implements it, so workspace is
// counted like everything else; tests use the heap.
class ScratchSource {
 public:
  virtual ~ScratchSource() = default;
  virtual void* AllocateScratch(size_t bytes) = 0;  // aligned to 64 bytes, uninitialised
  virtual void FreeScratch(void* data) = 0;
};

// On the CPU a kernel has finished when it returns; on CUDA it is queued on `handle`.
struct Stream {
  Device device;
  void* handle = nullptr;  // cudaStream_t
  ScratchSource* scratch = nullptr;
  KernelProfile* profile = nullptr;  // if set, kernels add their time

  // Kernels obtain their scratch and compute nothing.
  bool counting() const { return device.type == DeviceType::kMeta; }
};

// RAII over Stream::scratch. On CUDA the block may be reused by later kernels of the same stream.
class Scratch {
 public:
  Scratch(const Stream& stream, size_t bytes)
      : source_(stream.scratch), data_(bytes ? source_->AllocateScratch(bytes) : nullptr) {}
  ~Scratch() {
    if (data_) source_->FreeScratch(data_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  ScratchSource* source_;
  void* data_;
};

}  // namespace shoal
