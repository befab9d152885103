#include "core/shared_range.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdio>

namespace shoal {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kMadvCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, newer than some headers

size_t RoundUp(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

std::shared_ptr<SharedRange> SharedRange::Map(int file, size_t size) {
  // Both sides begin at a huge page, or none could be mapped.
  const size_t reserved_size = size + kHugePage;
  void* reserved =
      mmap(nullptr, reserved_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(reserved) + (RoundUp(reinterpret_cast<uintptr_t>(reserved)) -
                                                reinterpret_cast<uintptr_t>(reserved));
  if (mmap(begin, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file, 0) ==
      MAP_FAILED) {
    munmap(reserved, reserved_size);
    return nullptr;
  }
  madvise(begin, size, MADV_HUGEPAGE);
  return std::shared_ptr<SharedRange>(new SharedRange(file, size, reserved, reserved_size, begin));
}

std::shared_ptr<SharedRange> SharedRange::Create(size_t bytes) {
  // A file larger than the limit would end the process (SIGXFSZ).
  rlimit limit = {};
  if (getrlimit(RLIMIT_FSIZE, &limit) != 0) return nullptr;
  const int file = memfd_create("shoal", MFD_CLOEXEC);
  if (file < 0) return nullptr;
  for (size_t size = RoundUp(bytes); size >= kHugePage; size = RoundUp(size / 4)) {
    if (size <= limit.rlim_cur && ftruncate(file, static_cast<off_t>(size)) == 0) {
      if (auto range = Map(file, size)) return range;
    }
    if (size == kHugePage) break;
  }
  close(file);
  return nullptr;
}

std::string SharedRange::ticket() const {
  struct stat info = {};
  fstat(file_, &info);
  char text[128];
  std::snprintf(text, sizeof(text), "%d %d %" PRIuMAX " %" PRIuMAX " %zu", getpid(), file_,
                static_cast<uintmax_t>(info.st_dev), static_cast<uintmax_t>(info.st_ino), size_);
  return text;
}

std::shared_ptr<SharedRange> SharedRange::Open(const std::string& ticket) {
  int process = 0, number = 0;
  uintmax_t device = 0, inode = 0;
  size_t size = 0;
  if (std::sscanf(ticket.c_str(), "%d %d %" SCNuMAX " %" SCNuMAX " %zu", &process, &number, &device,
                  &inode, &size) != 5)
    return nullptr;
  const std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(number);
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  // A process of the same number in another container has other files.
  struct stat info = {};
  if (fstat(file, &info) == 0 && info.st_dev == device && info.st_ino == inode &&
      static_cast<size_t>(info.st_size) == size) {
    if (auto range = Map(file, size)) {
      range->Close();
      return range;
    }
  }
  close(file);
  return nullptr;
}

SharedRange::~SharedRange() {
  Close();
  munmap(reserved_, reserved_size_);
}

void SharedRange::Close() {
  if (file_ >= 0) close(file_);
  file_ = -1;
}

void SharedRange::Prepare(size_t bytes) {
  const size_t end = std::min(RoundUp(bytes), size_);
  if (end <= prepared_) return;
  // Systems leave huge pages of shared memory off as a rule, but make them when asked to for memory
  // that has been touched. With small ones a collective takes up to a third longer.
  if (collapse_) {
    for (size_t at = prepared_; at < end; at += kHugePage)
      *static_cast<volatile char*>(begin_ + at) = 0;
    collapse_ = madvise(begin_ + prepared_, end - prepared_, kMadvCollapse) == 0 || errno != EINVAL;
  }
  prepared_ = end;
}

}  // namespace shoal
