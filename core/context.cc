#include "core/context.h"

#include "core/base/build_config.h"
#include "core/base/error.h"
#include "kernels/cuda_runtime.h"

namespace shoal {
namespace {
thread_local ExecutionContext* current = nullptr;
}  // namespace

ExecutionContext::ExecutionContext(Device device)
    : ExecutionContext(device, Allocator::Create(device)) {}

ExecutionContext::ExecutionContext(Device device, std::shared_ptr<Allocator> allocator)
    : allocator_(std::move(allocator)) {
  stream_.device = device;
  stream_.scratch = allocator_.get();
  if (device.type == DeviceType::kCuda) {
    SHOAL_CHECK(kHaveCuda, "context", "built without CUDA");
    if constexpr (kHaveCuda) stream_.handle = cuda::CreateStream(device.index);
  }
}

ExecutionContext::~ExecutionContext() {
  if constexpr (kHaveCuda) {
    if (stream_.handle != nullptr) cuda::DestroyStream(stream_.handle);
  }
}

void ExecutionContext::Synchronize() const {
  if constexpr (kHaveCuda) {
    if (stream_.handle != nullptr) cuda::Synchronize(stream_.handle);
  }
}

ExecutionContext& ExecutionContext::Current() {
  if (current != nullptr) return *current;
  // Never destroyed: tensors of static lifetime may outlive main.
  static auto* process_default = new ExecutionContext(Device{});
  return *process_default;
}

ExecutionContext& ExecutionContext::Idle() {
  thread_local ExecutionContext idle(Device{DeviceType::kMeta});
  return idle;
}

ContextScope::ContextScope(ExecutionContext& context) : previous_(current) { current = &context; }
ContextScope::~ContextScope() { current = previous_; }

}  // namespace shoal
