#include "core/allocator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>
#include <vector>

#include "core/base/build_config.h"
#include "core/base/error.h"
#include "core/shared_range.h"
#include "kernels/cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (static_cast<void>(address))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (static_cast<void>(address))
#endif

namespace shoal {

const char* Name(MemoryClass memory_class) {
  constexpr const char* kNames[] = {"parameters",  "gradients",     "optimizer",
                                    "activations", "communication", "workspace"};
  return kNames[static_cast<int>(memory_class)];
}

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// More than any machine has, and far from where sums of sizes wrap around.
constexpr size_t kMaxBytes = size_t{1} << 60;
// To AddressSanitizer the range is one big array in which nothing can go wrong. Its build therefore
// keeps a gap behind each block, and poisons gaps and free blocks.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGap = 128;
#else
constexpr size_t kGap = 0;
#endif

size_t RoundUp(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Best fit over address ranges that are added as they are obtained. Knows addresses, not memory.
class BestFit {
 public:
  void AddRange(uintptr_t begin, size_t size) { Release(begin, size); }

  // 0 when no free range is long enough.
  uintptr_t Take(size_t size) {
    const auto it = by_size_.lower_bound({size, 0});
    if (it == by_size_.end()) return 0;
    const auto [free_size, begin] = *it;
    by_size_.erase(it);
    by_address_.erase(begin);
    if (free_size > size) Insert(begin + size, free_size - size);
    return begin;
  }

  void Release(uintptr_t begin, size_t size) {
    auto next = by_address_.lower_bound(begin);
    if (next != by_address_.end() && next->first == begin + size) {
      size += next->second;
      next = Erase(next);
    }
    if (next != by_address_.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == begin) {
        begin = previous->first;
        size += previous->second;
        Erase(previous);
      }
    }
    Insert(begin, size);
  }

 private:
  using ByAddress = std::map<uintptr_t, size_t>;
  void Insert(uintptr_t begin, size_t size) {
    by_address_.emplace(begin, size);
    by_size_.emplace(size, begin);
  }
  ByAddress::iterator Erase(ByAddress::iterator it) {
    by_size_.erase({it->second, it->first});
    return by_address_.erase(it);
  }

  ByAddress by_address_;
  // Equal sizes: the lowest address first, which keeps the touched part of the range short.
  std::set<std::pair<size_t, uintptr_t>> by_size_;
};

class RangeAllocator : public Allocator {
 public:
  explicit RangeAllocator(Device device) : device_(device) {
    if (device.type == DeviceType::kCpu) Reserve();
    if (device.type == DeviceType::kMeta) {
      first_ = kHugePage;
      ranges_.AddRange(first_, size_t{1} << 60);
    }
  }

  ~RangeAllocator() override {
    for (const auto& [begin, size] : segments_) {
      void* data = reinterpret_cast<void*>(begin);
      if (device_.type == DeviceType::kCpu) {
        // Whoever is given these addresses next must find them clean; beyond the highest block they
        // are.
        ASAN_UNPOISON_MEMORY_REGION(data, highest_ - begin);
        munmap(data, size);
      }
      if constexpr (kHaveCuda) {
        if (device_.type == DeviceType::kCuda) cuda::Free(data);
      }
    }
    if (shared_ != nullptr) ASAN_UNPOISON_MEMORY_REGION(shared_->begin(), shared_used_);
  }

  using Allocator::Allocate;
  void* Allocate(size_t bytes, MemoryClass memory_class, const BlockLabel& label) override {
    const std::lock_guard lock(mutex_);
    if (bytes > kMaxBytes || stats_.live_total + static_cast<int64_t>(bytes) > limit_)
      Exhausted(bytes, memory_class, label);
    const size_t size = RoundUp(std::max<size_t>(bytes, 1) + kGap, kAlignment);
    uintptr_t begin = Exchanged(memory_class) ? TakeShared(size) : 0;
    if (begin == 0) begin = ranges_.Take(size);
    if (begin == 0 && device_.type == DeviceType::kCuda) {
      GrowCuda(size);
      begin = ranges_.Take(size);
    }
    if (begin == 0) Exhausted(bytes, memory_class, label);
    blocks_.emplace(begin, Block{size, {memory_class, static_cast<int64_t>(bytes), label}});
    const int c = static_cast<int>(memory_class);
    stats_.live[c] += static_cast<int64_t>(bytes);
    stats_.live_total += static_cast<int64_t>(bytes);
    stats_.peak[c] = std::max(stats_.peak[c], stats_.live[c]);
    stats_.peak_total = std::max(stats_.peak_total, stats_.live_total);
    if (stats_.live_total > watched_) {
      watched_ = stats_.live_total;
      higher_ = true;
    }
    void* data = reinterpret_cast<void*>(begin);
    if (device_.type == DeviceType::kCpu) {
      ASAN_UNPOISON_MEMORY_REGION(data, bytes);
      ASAN_POISON_MEMORY_REGION(static_cast<char*>(data) + bytes, size - bytes);
    }
    if (!InShared(data)) highest_ = std::max(highest_, begin + size);
    return data;
  }

  void Free(void* data) override {
    const std::lock_guard lock(mutex_);
    const auto it = blocks_.find(reinterpret_cast<uintptr_t>(data));
    if (it == blocks_.end()) return;  // destructors call this: nothing to throw into
    KeepPeak();
    const Block block = it->second;
    blocks_.erase(it);
    stats_.live[static_cast<int>(block.live.memory_class)] -= block.live.bytes;
    stats_.live_total -= block.live.bytes;
    if (device_.type == DeviceType::kCpu) ASAN_POISON_MEMORY_REGION(data, block.size);
    (InShared(data) ? shared_blocks_ : ranges_)
        .Release(reinterpret_cast<uintptr_t>(data), block.size);
  }

  void Share(std::shared_ptr<SharedRange> range) override {
    const std::lock_guard lock(mutex_);
    SHOAL_CHECK(shared_ == nullptr && device_.type == DeviceType::kCpu, "allocator",
                "a second shared range, or one for {}", Name(device_.type));
    shared_ = std::move(range);
    shared_blocks_.AddRange(SharedBegin(), shared_->size());
  }

  MemoryStats stats() const override {
    const std::lock_guard lock(mutex_);
    MemoryStats stats = stats_;
    if (device_.type != DeviceType::kCuda)
      stats.extent = static_cast<int64_t>(std::max(highest_, first_) - first_ + shared_used_);
    return stats;
  }

  void ResetPeak() override {
    const std::lock_guard lock(mutex_);
    stats_.peak = stats_.live;
    stats_.peak_total = stats_.live_total;
  }

  std::vector<LiveBlock> Live() const override {
    const std::lock_guard lock(mutex_);
    return LiveBlocks();
  }

  void WatchPeak(bool on) override {
    const std::lock_guard lock(mutex_);
    at_peak_.clear();
    watched_ = on ? stats_.live_total : kNever;
    higher_ = on;
  }

  std::vector<LiveBlock> AtPeak() const override {
    const std::lock_guard lock(mutex_);
    return higher_ ? LiveBlocks() : at_peak_;
  }

  void set_limit(int64_t bytes) override {
    const std::lock_guard lock(mutex_);
    limit_ = bytes;
  }

 private:
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

  struct Block {
    size_t size;  // taken from the range
    LiveBlock live;
  };

  std::vector<LiveBlock> LiveBlocks() const {
    std::vector<LiveBlock> live;
    live.reserve(blocks_.size());
    for (const auto& [begin, block] : blocks_) live.push_back(block.live);
    return live;
  }

  // Before a block goes: between a highest sum and the first block that is freed nothing has
  // changed, for whatever is added makes another highest sum.
  void KeepPeak() {
    if (!higher_) return;
    higher_ = false;
    try {
      at_peak_ = LiveBlocks();
    } catch (const std::bad_alloc&) {
      at_peak_.clear();  // whoever frees may not fail
    }
  }

  static bool Exchanged(MemoryClass memory_class) {
    return memory_class == MemoryClass::kParameters || memory_class == MemoryClass::kGradients ||
           memory_class == MemoryClass::kCommunication;
  }
  uintptr_t SharedBegin() const { return reinterpret_cast<uintptr_t>(shared_->begin()); }
  uintptr_t TakeShared(size_t size) {
    const uintptr_t begin = shared_blocks_.Take(size);
    if (begin != 0) {
      shared_used_ = std::max(shared_used_, begin + size - SharedBegin());
      shared_->Prepare(shared_used_);
    }
    return begin;
  }
  bool InShared(const void* data) const { return shared_ != nullptr && shared_->Holds(data, 1); }

  // Address space is reserved far beyond the machine's memory and costs nothing until touched; one
  // range means that any freed neighbours merge. Limits on address space make it smaller.
  void Reserve() {
    const size_t physical =
        static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
    for (size_t size = RoundUp(2 * physical, kHugePage); size >= kHugePage; size /= 2) {
      void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (data == MAP_FAILED) continue;
      madvise(data, size, MADV_HUGEPAGE);  // a hint: without it pages are small, not wrong
      const auto begin = reinterpret_cast<uintptr_t>(data);
      segments_.emplace_back(begin, size);
      highest_ = begin;
      first_ = RoundUp(begin, kHugePage);
      ranges_.AddRange(first_, begin + size - first_);
      return;
    }
    SHOAL_FAIL(ErrorKind::kMemory, "allocator",
               "no address space for a memory range. Raise the limit (ulimit -v)");
  }

  void GrowCuda(size_t size) {
    if constexpr (kHaveCuda) {
      // The last piece of a segment is never handed out: two segments that happen to be neighbours
      // must not merge, for the driver refuses copies across them.
      size_t segment = RoundUp(std::max(size + kAlignment, size_t{256} << 20), kHugePage);
      void* data = cuda::Allocate(device_.index, segment);
      if (data == nullptr) {
        segment = size + kAlignment;
        data = cuda::Allocate(device_.index, segment);
      }
      if (data == nullptr) return;
      segments_.emplace_back(reinterpret_cast<uintptr_t>(data), segment);
      ranges_.AddRange(reinterpret_cast<uintptr_t>(data), segment - kAlignment);
    }
  }

  [[noreturn]] void Exhausted(size_t bytes, MemoryClass memory_class,
                              const BlockLabel& label) const {
    std::string table;
    for (int c = 0; c < kMemoryClasses; ++c) {
      table += fmt::format("{}{} {} MB", c ? ", " : "", Name(static_cast<MemoryClass>(c)),
                           stats_.live[c] >> 20);
    }
    const Origin& origin = label.origin;
    throw OutOfMemory(
        Error(ErrorKind::kMemory, "allocator",
              fmt::format("no room for {} bytes of {} ({}{}{}{}{}{}) on {}{}; live: {}", bytes,
                          Name(memory_class),
                          label.shape.rank() == 0
                              ? "scratch"
                              : fmt::format("{} {}", Name(label.dtype), label.shape.ToString()),
                          origin.module ? ", " : "", origin.module ? *origin.module : "",
                          origin.op ? ", " : "", origin.op ? origin.op : "",
                          origin.pass == Pass::kNone ? "" : fmt::format(", {}", Name(origin.pass)),
                          Name(device_.type),
                          limit_ == kNever ? "" : fmt::format(", limited to {} bytes", limit_),
                          table),
              __FILE__, __LINE__),
        LiveBlocks());
  }

  const Device device_;
  mutable std::mutex mutex_;
  BestFit ranges_;
  std::vector<std::pair<uintptr_t, size_t>> segments_;
  uintptr_t first_ = 0;    // of the one range
  uintptr_t highest_ = 0;  // end of the highest block in it so far
  std::shared_ptr<SharedRange> shared_;
  BestFit shared_blocks_;
  size_t shared_used_ = 0;  // bytes up to the end of its highest block so far
  std::unordered_map<uintptr_t, Block> blocks_;
  MemoryStats stats_;
  int64_t limit_ = kNever;
  int64_t watched_ = kNever;  // the highest sum while it is watched
  bool higher_ = false;       // than when at_peak_ was taken
  std::vector<LiveBlock> at_peak_;
};

}  // namespace

std::shared_ptr<Allocator> Allocator::Create(Device device) {
  return std::make_shared<RangeAllocator>(device);
}

}  // namespace shoal
