// Memory of one rank, counted by class. Every tensor and every kernel's scratch comes from here, so
// the figures in metrics.jsonl and in `plan` are sums over the same calls.
//
// Blocks come from one address range per allocator by best fit and are merged with their neighbours
// when freed; what ranks of one host exchange may come from a second range, which all of them map.
// Memory that was touched once stays mapped (huge pages where the system gives them), so a steady
// training step takes no page faults. Thread-safe: a tensor may be freed by another thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "core/base/device.h"
#include "core/base/stream.h"

namespace shoal {

class SharedRange;

enum class MemoryClass : uint8_t {
  kParameters,
  kGradients,
  kOptimizer,
  kActivations,
  kCommunication,
  kWorkspace,
};
inline constexpr int kMemoryClasses = 6;
const char* Name(MemoryClass memory_class);

// Bytes as asked for, without rounding.
struct MemoryStats {
  std::array<int64_t, kMemoryClasses> live = {}, peak = {};
  int64_t live_total = 0;
  int64_t peak_total = 0;  // highest sum, at most the sum of the peaks
};

class Allocator : public ScratchSource {
 public:
  // For kCpu, memory; for kMeta, addresses that must not be touched, counted alike; for kCuda,
  // device memory of `device.index`.
  static std::shared_ptr<Allocator> Create(Device device);

  ~Allocator() override = default;
  // Aligned to 64 bytes, uninitialised; never null. Throws Error(kBug) naming class, bytes and the
  // table of live bytes when memory is exhausted.
  virtual void* Allocate(size_t bytes, MemoryClass memory_class) = 0;
  virtual void Free(void* data) = 0;
  virtual MemoryStats stats() const = 0;
  virtual void ResetPeak() = 0;  // peaks become the live figures
  // From now on parameters, gradients and communication lie in `range` while it has room. Once, and
  // for kCpu only.
  virtual void Share(std::shared_ptr<SharedRange> range) = 0;

  void* AllocateScratch(size_t bytes) override { return Allocate(bytes, MemoryClass::kWorkspace); }
  void FreeScratch(void* data) override { Free(data); }
};

}  // namespace shoal
