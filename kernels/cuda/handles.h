// What the kernels keep per device: the cuBLASLt handle and the fault record.
#pragma once

#include <cstdint>

struct cublasLtContext;

namespace shoal::kernels::cuda {

// A value that only the device could find to be wrong. It lies in page-locked host memory. The
// first thread to find one claims the record; the next Synchronize on the device reads it, clears
// it and throws. Until then later faults are dropped: one is enough to stop.
struct FaultRecord {
  int claimed = 0;
  volatile int ready = 0;
  const char* op = nullptr;  // of the host
  bool is_label = false;     // else a token id
  int64_t row = 0, value = 0, limit = 0;
};

class DeviceState {
 public:
  explicit DeviceState(int device);
  DeviceState(const DeviceState&) = delete;
  DeviceState& operator=(const DeviceState&) = delete;
  ~DeviceState();

  cublasLtContext* cublaslt() const { return cublaslt_; }
  FaultRecord* faults() const { return faults_; }
  int max_shared_bytes() const { return max_shared_bytes_; }  // of one block

  void ThrowFault();  // if there is one; the device's work must have ended

 private:
  int device_;
  int max_shared_bytes_ = 0;
  cublasLtContext* cublaslt_ = nullptr;
  FaultRecord* faults_ = nullptr;
};

DeviceState& StateOf(int device);

}  // namespace shoal::kernels::cuda
