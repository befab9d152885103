// What a rank's thread computes with: its device, its memory, its stream. Thread-local, because
// ranks may be threads of one process; a thread that was given none shares the process's default on
// the CPU.
#pragma once

#include <memory>

#include "core/allocator.h"
#include "core/base/stream.h"

namespace shoal {

class ExecutionContext {
 public:
  explicit ExecutionContext(Device device);
  ExecutionContext(Device device, std::shared_ptr<Allocator> allocator);
  ~ExecutionContext();
  ExecutionContext(const ExecutionContext&) = delete;
  ExecutionContext& operator=(const ExecutionContext&) = delete;

  Device device() const { return stream_.device; }
  const Stream& stream() const { return stream_; }
  const std::shared_ptr<Allocator>& allocator() const { return allocator_; }
  // Kernels of this context add their time to `profile` (may be null) from now on.
  void set_profile(KernelProfile* profile) { stream_.profile = profile; }
  void Synchronize() const;  // waits until everything queued has run

  static ExecutionContext& Current();
  // For results that nobody will read: nothing is computed, sent or counted here, and tensors have
  // addresses that must not be touched.
  static ExecutionContext& Idle();
  bool idle() const { return this == &Idle(); }

 private:
  std::shared_ptr<Allocator> allocator_;
  Stream stream_;
};

// Makes `context` the current one of this thread while in scope.
class ContextScope {
 public:
  explicit ContextScope(ExecutionContext& context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  ExecutionContext* previous_;
};

}  // namespace shoal
