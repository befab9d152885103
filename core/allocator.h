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
#include <vector>

#include "core/base/device.h"
#include "core/base/error.h"
#include "core/base/stream.h"
#include "core/origin.h"

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
  // Addresses up to the highest that was used so far, on the CPU and meta: what is beyond the peak
  // is lost between blocks.
  int64_t extent = 0;
};

struct LiveBlock {
  MemoryClass memory_class;
  int64_t bytes;  // as asked for
  BlockLabel label;
};

// Error(kMemory), and what was alive.
class OutOfMemory : public Error {
 public:
  OutOfMemory(const Error& error, std::vector<LiveBlock> live)
      : Error(error), live_(std::move(live)) {}
  const std::vector<LiveBlock>& live() const { return live_; }

 private:
  std::vector<LiveBlock> live_;
};

class Allocator : public ScratchSource {
 public:
  // For kCpu, memory; for kMeta, addresses that must not be touched, counted alike; for kCuda,
  // device memory of `device.index`.
  static std::shared_ptr<Allocator> Create(Device device);

  ~Allocator() override = default;
  // Aligned to 64 bytes, uninitialised; never null. Throws OutOfMemory naming bytes, class, label
  // and the table of live bytes when memory, or the limit, is exhausted.
  virtual void* Allocate(size_t bytes, MemoryClass memory_class, const BlockLabel& label) = 0;
  void* Allocate(size_t bytes, MemoryClass memory_class) {
    return Allocate(bytes, memory_class, {CurrentOrigin(), DType::kU8, {}});
  }
  virtual void Free(void* data) = 0;
  virtual MemoryStats stats() const = 0;
  virtual void ResetPeak() = 0;  // peaks become the live figures
  // From now on parameters, gradients and communication lie in `range` while it has room. Once, and
  // for kCpu only.
  virtual void Share(std::shared_ptr<SharedRange> range) = 0;

  // The ledger, of memory; a file has none.
  virtual std::vector<LiveBlock> Live() const { return {}; }
  // From now on the blocks that were alive when the sum was highest are kept, or (false) no more.
  virtual void WatchPeak(bool /*on*/) {}
  virtual std::vector<LiveBlock> AtPeak() const { return {}; }  // since WatchPeak(true)
  // Sums of live bytes beyond it are refused. What is alive already stays.
  virtual void set_limit(int64_t /*bytes*/) {}

  void* AllocateScratch(size_t bytes) override { return Allocate(bytes, MemoryClass::kWorkspace); }
  void FreeScratch(void* data) override { Free(data); }
};

}  // namespace shoal
