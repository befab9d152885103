#include <cublasLt.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>

#include "kernels/cuda/device_utils.cuh"
#include "kernels/cuda/handles.h"

namespace shoal::kernels::cuda {
namespace {

std::mutex& StatesMutex() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

DeviceState::DeviceState(int device) : device_(device) {
  const char* op = "cuda device";
  SHOAL_CUDA_CHECK(cudaSetDevice(device), op);
  SHOAL_CUDA_CHECK(
      cudaDeviceGetAttribute(&max_shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      op);
  void* record = nullptr;
  SHOAL_CUDA_CHECK(cudaHostAlloc(&record, sizeof(FaultRecord), cudaHostAllocPortable), op);
  faults_ = new (record) FaultRecord;
  const cublasStatus_t status = cublasLtCreate(&cublaslt_);
  if (status != CUBLAS_STATUS_SUCCESS) {
    cudaFreeHost(record);
    SHOAL_FAIL(ErrorKind::kBug, op, "cublasLtCreate on device {}: {}", device,
               cublasLtGetStatusString(status));
  }
}

DeviceState::~DeviceState() {
  cublasLtDestroy(cublaslt_);
  cudaFreeHost(faults_);
}

void DeviceState::ThrowFault() {
  std::unique_lock lock(StatesMutex());
  if (!faults_->ready) return;
  const char* op = faults_->op;
  const bool is_label = faults_->is_label;
  const int64_t row = faults_->row, value = faults_->value, limit = faults_->limit;
  faults_->ready = 0;
  std::atomic_thread_fence(std::memory_order_seq_cst);  // the next claim starts from ready = 0
  faults_->claimed = 0;
  lock.unlock();
  if (is_label)
    SHOAL_FAIL(ErrorKind::kData, op,
               "row {} has label {}, but the vocabulary has {} entries: the data was made with "
               "another tokenizer, or the model's vocab is too small",
               row, value, limit);
  SHOAL_FAIL(ErrorKind::kData, op, "token {} has id {}, but the vocabulary is [0, {})", row, value,
             limit);
}

DeviceState& StateOf(int device) {
  constexpr int kMostDevices = 64;
  // Never destroyed: at process exit the driver may already be gone.
  static auto* states = new std::array<std::atomic<DeviceState*>, kMostDevices>{};
  SHOAL_CHECK(device >= 0 && device < kMostDevices, "cuda device", "there is no device {}", device);
  std::atomic<DeviceState*>& state = (*states)[device];
  if (DeviceState* ready = state.load(std::memory_order_acquire)) return *ready;
  std::lock_guard lock(StatesMutex());
  if (!state.load(std::memory_order_relaxed))
    state.store(new DeviceState(device), std::memory_order_release);
  return *state.load(std::memory_order_relaxed);
}

}  // namespace shoal::kernels::cuda
