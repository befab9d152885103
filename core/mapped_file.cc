#include "core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>

#include "core/base/error.h"

namespace shoal {
namespace {

size_t Page() {
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
  return page;
}

int OpenNameless(const std::string& dir) {
  const int fd = open(dir.c_str(), O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC, 0600);
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return fd;
  // A file system without nameless files.
  std::string name = dir + "/shoal-XXXXXX";
  const int named = mkostemp(name.data(), O_CLOEXEC);
  if (named >= 0) unlink(name.c_str());
  return named;
}

}  // namespace

// Each allocation is a range of the file and a mapping of its own.
class MappedFile::Mapping : public Allocator {
 public:
  Mapping(const std::string& dir, const std::string& what)
      : dir_(dir), what_(what), fd_(OpenNameless(dir)) {
    if (fd_ < 0)
      SHOAL_FAIL(ErrorKind::kStorage, "offload", "no file for {} can be made in {}: {}", what, dir,
                 std::strerror(errno));
  }
  ~Mapping() override {
    for (const auto& [data, range] : ranges_) munmap(data, range.size);
    for (const auto& [size, data] : spare_) munmap(data.first, size);
    close(fd_);
  }

  using Allocator::Allocate;
  void* Allocate(size_t bytes, MemoryClass memory_class, const BlockLabel&) override {
    const std::lock_guard lock(mutex_);
    const size_t size = (std::max<size_t>(bytes, 1) + Page() - 1) / Page() * Page();
    if (const auto spare = spare_.find(size); spare != spare_.end()) {
      const auto [data, at] = spare->second;
      spare_.erase(spare);
      return Count(data, {at, size, static_cast<int64_t>(bytes), memory_class});
    }
    const int failed = posix_fallocate(fd_, static_cast<off_t>(end_), static_cast<off_t>(size));
    if (failed != 0) {
      struct statvfs fs = {};
      const bool known = fstatvfs(fd_, &fs) == 0;
      SHOAL_FAIL(ErrorKind::kStorage, "offload",
                 "{} need {} bytes more in {}, which has {} free ({}): make room, or name another "
                 "folder with zero.offload_dir",
                 what_, size, dir_, known ? fs.f_bavail * fs.f_frsize : 0, std::strerror(failed));
    }
    void* data =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, static_cast<off_t>(end_));
    if (data == MAP_FAILED)
      SHOAL_FAIL(ErrorKind::kStorage, "offload", "{} bytes of the file in {} cannot be mapped: {}",
                 size, dir_, std::strerror(errno));
    const size_t at = end_;
    end_ += size;
    return Count(data, {at, size, static_cast<int64_t>(bytes), memory_class});
  }
  void Free(void* data) override {
    const std::lock_guard lock(mutex_);
    const auto it = ranges_.find(data);
    if (it == ranges_.end()) return;
    spare_.emplace(it->second.size, std::pair(data, it->second.at));
    stats_.live[static_cast<int>(it->second.memory_class)] -= it->second.bytes;
    stats_.live_total -= it->second.bytes;
    ranges_.erase(it);
  }
  MemoryStats stats() const override {
    const std::lock_guard lock(mutex_);
    return stats_;
  }
  // A file is this rank's own.
  void Share(std::shared_ptr<SharedRange>) override {}
  void ResetPeak() override {
    const std::lock_guard lock(mutex_);
    stats_.peak_total = stats_.live_total;
  }

  // Of tensors that are no more, nothing.
  void Read(const View& v) const {
    if (const auto p = Of(v)) madvise(p->data, p->size, MADV_WILLNEED);
  }
  void Write(const View& v) const {
    if (const auto p = Of(v))
      sync_file_range(fd_, p->at, static_cast<off_t>(p->size), SYNC_FILE_RANGE_WRITE);
  }
  // Written, it needs no memory; a file system that cannot tell keeps the pages until it must.
  void Drop(const View& v) const {
    const auto p = Of(v);
    if (!p) return;
    sync_file_range(
        fd_, p->at, static_cast<off_t>(p->size),
        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    madvise(p->data, p->size, MADV_DONTNEED);
    posix_fadvise(fd_, p->at, static_cast<off_t>(p->size), POSIX_FADV_DONTNEED);
  }

 private:
  struct Range {
    size_t at, size;
    int64_t bytes;
    MemoryClass memory_class;
  };
  void* Count(void* data, const Range& range) {
    ranges_[data] = range;
    stats_.live[static_cast<int>(range.memory_class)] += range.bytes;
    stats_.live_total += range.bytes;
    stats_.peak_total = std::max(stats_.peak_total, stats_.live_total);
    return data;
  }
  struct Place {
    void* data;
    off_t at;
    size_t size;
  };
  std::optional<Place> Of(const View& v) const {
    const std::lock_guard lock(mutex_);
    const auto found = ranges_.find(v.data);
    if (found == ranges_.end()) return std::nullopt;
    return Place{v.data, static_cast<off_t>(found->second.at), found->second.size};
  }

  std::string dir_, what_;
  int fd_;
  mutable std::mutex mutex_;
  size_t end_ = 0;
  std::map<void*, Range> ranges_;
  std::multimap<size_t, std::pair<void*, size_t>> spare_;  // freed: by size, where and at
  MemoryStats stats_;
};

MappedFile::MappedFile(const std::string& dir, const std::string& what) {
  const Device device = ExecutionContext::Current().device();
  if (device.type == DeviceType::kMeta) {
    context_ = std::make_unique<ExecutionContext>(device);
    return;
  }
  mapping_ = std::make_shared<Mapping>(dir, what);
  context_ = std::make_unique<ExecutionContext>(Device{}, mapping_);
}

MappedFile::~MappedFile() = default;

void MappedFile::Prefetch(std::span<const View> views) const {
  if (mapping_ == nullptr) return;
  for (const View& v : views) mapping_->Read(v);
}

void MappedFile::Retire(std::span<const View> views) {
  if (mapping_ == nullptr) return;
  for (const View& v : views) mapping_->Write(v);
  Settle();
  retired_.assign(views.begin(), views.end());
}

void MappedFile::Settle() {
  for (const View& v : retired_) mapping_->Drop(v);
  retired_.clear();
}

}  // namespace shoal
