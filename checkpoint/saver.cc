#include "checkpoint/saver.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "checkpoint/behind.h"
#include "checkpoint/store.h"
#include "core/base/error.h"

namespace shoal {
namespace {

template <class T>
bool Ready(const std::future<T>& future) {
  return future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

// Of the calling thread, which then takes what computation leaves of the cores; a hint.
void GiveWay() {
  constexpr int kNice = 10;
  setpriority(PRIO_PROCESS, 0, kNice);
}

}  // namespace

struct Saver::Memory {
  explicit Memory(int64_t size) : bytes(size) {
    void* mapped = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
      SHOAL_FAIL(ErrorKind::kMemory, "checkpoint",
                 "no memory for the {:.1f} MB that a save is staged in. Lower checkpoint.staging",
                 static_cast<double>(bytes) / 1e6);
    madvise(mapped, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a hint
    data = static_cast<char*>(mapped);
  }
  ~Memory() { munmap(data, static_cast<size_t>(bytes)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Values stay as they are, so that a save may be under way already. Where the system cannot do
  // it, the first save does.
  void Touch(const std::atomic<bool>& given_up) const {
    for (int64_t at = 0; at < bytes && !given_up; at += kChunkBytes)
      if (madvise(data + at, static_cast<size_t>(std::min(kChunkBytes, bytes - at)),
                  MADV_POPULATE_WRITE) != 0)
        return;
  }

  const int64_t bytes;
  char* data;
};

// The staging memory in slots that go from the copying thread to the writing one and back.
struct Saver::Staging {
  struct Slot {
    char* data = nullptr;
    int64_t bytes = 0;
  };

  // `memory` holds whole slots.
  Staging(std::shared_ptr<Memory> memory, int64_t slot_bytes)
      : memory(std::move(memory)), slot_bytes(slot_bytes) {
    for (int64_t at = 0; at < this->memory->bytes; at += slot_bytes)
      free.push_back({this->memory->data + at, 0});
  }

  // An empty slot; nothing if the save was given up.
  bool TakeFree(Slot* slot) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return cancelled || !free.empty(); });
    if (cancelled) return false;
    *slot = free.front();
    free.pop_front();
    staged += slot_bytes;
    peak = std::max(peak, staged);
    return true;
  }
  void Fill(const Slot& slot) {
    const std::lock_guard lock(mutex);
    filled.push_back(slot);
    changed.notify_all();
  }
  // The next filled slot; false after the last, or if the save was given up.
  bool TakeFilled(Slot* slot) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return cancelled || !filled.empty() || complete; });
    if (cancelled || filled.empty()) return false;
    *slot = filled.front();
    filled.pop_front();
    return true;
  }
  void GiveBack(Slot slot) {
    const std::lock_guard lock(mutex);
    slot.bytes = 0;
    free.push_back(slot);
    staged -= slot_bytes;
    changed.notify_all();
  }
  void Complete() {
    const std::lock_guard lock(mutex);
    complete = true;
    changed.notify_all();
  }
  void Cancel() {
    const std::lock_guard lock(mutex);
    cancelled = true;
    changed.notify_all();
  }
  bool Cancelled() {
    const std::lock_guard lock(mutex);
    return cancelled;
  }

  void CopyAll(PartImage image) {
    while (image.left() > 0) {
      Slot slot;
      if (!TakeFree(&slot)) return;
      slot.bytes = image.Next(slot.data, slot_bytes);
      Fill(slot);
    }
    Complete();
  }

  std::mutex mutex;
  std::condition_variable changed;
  const std::shared_ptr<Memory> memory;
  const int64_t slot_bytes;
  int64_t staged = 0, peak = 0;
  std::deque<Slot> free, filled;
  bool complete = false, cancelled = false;
};

Saver::Saver(std::string directory, PartPlan plan, SaverOptions options)
    : directory_(std::move(directory)), plan_(std::move(plan)), options_(std::move(options)) {}

Saver::~Saver() {
  given_up_ = true;
  if (staging_ != nullptr) staging_->Cancel();
  // The futures wait for their threads.
}

// In pages, as the disk takes them, if there is room for some.
int64_t Saver::slot_bytes() const {
  const int64_t most = std::min(options_.staging / 2, kChunkBytes);
  const int64_t unit = most < kDirectBytes ? 64 : kDirectBytes;
  const int64_t file = (plan_.layout.size + unit - 1) / unit * unit;
  return std::max(std::min(most, file) / unit * unit, unit);
}

// Two slots at least: one is written while the next is filled.
int64_t Saver::staging_bytes() const {
  const int64_t slot = slot_bytes();
  return slot * std::clamp(options_.staging / slot, int64_t{2}, plan_.layout.size / slot + 2);
}

void Saver::Warm() {
  if (memory_ != nullptr) return;
  memory_ = std::make_shared<Memory>(staging_bytes());
  warmed_ = Behind([this, memory = memory_] {
    GiveWay();
    memory->Touch(given_up_);
  });
}

void Saver::Begin(int64_t step, const StateDict& state) {
  SHOAL_CHECK(staging_ == nullptr && !part_.valid(), "checkpoint", "a save is still under way");
  PartImage image(plan_, state);
  staging_ = std::make_shared<Staging>(
      memory_ != nullptr ? memory_ : std::make_shared<Memory>(staging_bytes()), slot_bytes());
  state_ = state;
  copied_ = Behind([staging = staging_, image = std::move(image)]() mutable {
    staging->CopyAll(std::move(image));
  });
  // Where nobody waits for what is written.
  const bool unhurried = staging_bytes() >= plan_.layout.size;
  part_ = Behind([this, step, unhurried, staging = staging_] {
    if (unhurried) GiveWay();
    try {
      return Write(step, *staging);
    } catch (...) {
      staging->Cancel();  // nobody copies for a writer that has failed
      throw;
    }
  });
}

std::string Saver::Write(int64_t step, Staging& staging) const {
  FullDisk full_disk = options_.full_disk;
  full_disk.cancelled = [&] { return staging.Cancelled(); };
  PartFile file(PartialSave(directory_, step), plan_, full_disk);
  for (Staging::Slot slot; staging.TakeFilled(&slot);) {
    if (options_.before_write) options_.before_write();
    file.Append(slot.data, slot.bytes);
    staging.GiveBack(slot);
  }
  if (staging.Cancelled())
    SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "the save of step {} was given up", step);
  if (!file.non_finite().empty())
    SHOAL_FAIL(ErrorKind::kConfig, "checkpoint", "{} is not finite after step {}",
               file.non_finite(), step);
  return file.Finish();
}

void Saver::WaitCopied() {
  if (copied_.valid()) copied_.get();
}

bool Saver::Written() const { return !part_.valid() || Ready(part_); }

std::string Saver::TakePart() {
  WaitCopied();
  SHOAL_CHECK(part_.valid(), "checkpoint", "no save was begun");
  peak_staged_ = std::max(peak_staged_, staging_->peak);
  part_.wait();
  staging_ = nullptr;
  state_.clear();
  return part_.get();
}

void Saver::Commit(std::function<void(const FullDisk&)> commit) {
  FullDisk full_disk = options_.full_disk;
  full_disk.cancelled = [this] { return given_up_.load(); };
  commit_ = Behind([full_disk, commit = std::move(commit)] { commit(full_disk); });
}
bool Saver::Committed() const { return !commit_.valid() || Ready(commit_); }
void Saver::TakeCommit() {
  if (commit_.valid()) commit_.get();
}

int64_t Saver::peak_staged() const { return peak_staged_; }

}  // namespace shoal
