#include "checkpoint/file_io.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "core/base/error.h"

namespace shoal {
namespace {

using Clock = std::chrono::steady_clock;

[[noreturn]] void Fail(const std::string& path, const std::string& what, int error) {
  FailFile(path, fmt::format("{}: {}", what, std::strerror(error)));
}

bool IsFull(int error) { return error == ENOSPC || error == EDQUOT || error == EFBIG; }

// "1.2 MB of it are to be written and 0.3 MB are free".
std::string Shortage(const std::string& path, int64_t needed, int error) {
  const double megabytes = static_cast<double>(needed) / 1e6;
  rlimit limit = {};
  if (error == EFBIG && getrlimit(RLIMIT_FSIZE, &limit) == 0)
    return fmt::format("{:.1f} MB are to be written and this process may write files of {:.1f} MB",
                       megabytes, static_cast<double>(limit.rlim_cur) / 1e6);
  struct statvfs fs = {};
  statvfs(path.c_str(), &fs);
  return fmt::format("{:.1f} MB are to be written and {:.1f} MB are free{}", megabytes,
                     static_cast<double>(fs.f_bavail) * static_cast<double>(fs.f_frsize) / 1e6,
                     error == EDQUOT ? "; the quota is used up" : "");
}

// Calls `attempt` until it returns 0 or an errno that no space can mend. `needed`: bytes that it
// still has to find room for.
template <class Attempt, class Needed>
void WaitForSpace(const std::string& path, const FullDisk& full_disk, const Needed& needed,
                  const Attempt& attempt) {
  constexpr auto kRetry = std::chrono::milliseconds(100), kWarn = std::chrono::milliseconds(5000);
  const Clock::time_point begin = Clock::now();
  Clock::time_point warned = begin - kWarn;
  bool waited = false;
  for (int error = attempt(); error != 0; error = attempt()) {
    if (!IsFull(error)) Fail(path, "cannot be written", error);
    const std::string shortage = Shortage(path, needed(), error);
    const double left =
        full_disk.seconds - std::chrono::duration<double>(Clock::now() - begin).count();
    if (full_disk.cancelled && full_disk.cancelled())
      SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{}: not wanted any more", path);
    if (left <= 0)
      SHOAL_FAIL(ErrorKind::kStorage, "checkpoint",
                 "{}: no space left: {}{}. Make room, or raise the limit (ulimit -f)", path,
                 shortage,
                 waited ? fmt::format(", after {:.0f} s of waiting", full_disk.seconds) : "");
    if (Clock::now() - warned >= kWarn && full_disk.warn) {
      warned = Clock::now();
      full_disk.warn(fmt::format("{}: no space left: {}; waiting for room for {:.0f} s more", path,
                                 shortage, left));
    }
    waited = true;
    std::this_thread::sleep_for(kRetry);
  }
  if (waited && full_disk.warn) full_disk.warn(fmt::format("{}: there is room again", path));
}

}  // namespace

void FailFile(const std::string& path, const std::string& what) {
  SHOAL_FAIL(ErrorKind::kStorage, "checkpoint", "{}: {}", path, what);
}

File File::Create(const std::string& path) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (file < 0) Fail(path, "cannot be created", errno);
  return {path, file};
}

File File::Open(const std::string& path) {
  // A pipe must not be waited for.
  File file(path, open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info = {};
  if (file.file_ < 0 || fstat(file.file_, &info) != 0) Fail(path, "cannot be read", errno);
  if (!S_ISREG(info.st_mode)) FailFile(path, "is not a regular file");
  return file;
}

File File::OpenToAppend(const std::string& path) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (file < 0) Fail(path, "cannot be written", errno);
  return {path, file};
}

File::~File() {
  if (file_ >= 0) close(file_);
  if (direct_ >= 0) close(direct_);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, -1)),
      direct_(std::exchange(other.direct_, kNotOpen)) {}

int64_t File::size() const {
  struct stat info = {};
  if (fstat(file_, &info) != 0) Fail(path_, "cannot be read", errno);
  return info.st_size;
}

void File::Read(void* data, int64_t bytes, int64_t at) const {
  for (int64_t done = 0; done < bytes;) {
    const ssize_t n =
        pread(file_, static_cast<char*>(data) + done, static_cast<size_t>(bytes - done), at + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) Fail(path_, "cannot be read", errno);
    if (n == 0) FailFile(path_, fmt::format("ends at byte {}: it is cut short", at + done));
    done += n;
  }
}

void File::Reserve(int64_t bytes, const FullDisk& full_disk) {
  WaitForSpace(
      path_, full_disk, [&] { return bytes; },
      [&] {
        for (;;) {
          if (fallocate(file_, 0, 0, bytes) == 0) return 0;
          if (errno == EINTR) continue;
          // A file system that cannot reserve is met when it is written.
          return IsFull(errno) ? errno : 0;
        }
      });
}

// `put(done)` writes what comes after `done` bytes, or a part of it, as write does.
template <class Put>
void File::PutAll(int64_t bytes, const FullDisk& full_disk, const Put& put) {
  int64_t done = 0;
  WaitForSpace(
      path_, full_disk, [&] { return bytes - done; },
      [&] {
        while (done < bytes) {
          const ssize_t n = put(done);
          if (n < 0 && errno == EINTR) continue;
          if (n < 0) return errno;
          done += n;
        }
        return 0;
      });
}

void File::Write(const void* data, int64_t bytes, int64_t at, const FullDisk& full_disk) {
  PutAll(bytes, full_disk, [&](int64_t done) {
    return pwrite(file_, static_cast<const char*>(data) + done, static_cast<size_t>(bytes - done),
                  at + done);
  });
}

void File::WriteDirect(const void* data, int64_t bytes, int64_t at, const FullDisk& full_disk) {
  const bool aligned =
      at % kDirectBytes == 0 && reinterpret_cast<uintptr_t>(data) % kDirectBytes == 0;
  if (aligned && direct_ == kNotOpen) {
    direct_ = open(path_.c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC);
    if (direct_ < 0) direct_ = kNotPossible;
  }
  PutAll(bytes, full_disk, [&](int64_t done) {
    const char* from = static_cast<const char*>(data) + done;
    const auto left = static_cast<size_t>(bytes - done), pages = left / kDirectBytes * kDirectBytes;
    if (direct_ >= 0 && aligned && done % kDirectBytes == 0 && pages > 0) {
      const ssize_t n = pwrite(direct_, from, pages, at + done);
      if (n >= 0 || errno != EINVAL) return n;
      close(std::exchange(direct_, kNotPossible));  // the disk's blocks are larger than that
    }
    const ssize_t n = pwrite(file_, from, left, at + done);
    // A hint: Flush waits for it, and says what went wrong.
    if (n > 0) sync_file_range(file_, at + done, n, SYNC_FILE_RANGE_WRITE);
    return n;
  });
}

void File::Append(const void* data, int64_t bytes, const FullDisk& full_disk) {
  PutAll(bytes, full_disk, [&](int64_t done) {
    return write(file_, static_cast<const char*>(data) + done, static_cast<size_t>(bytes - done));
  });
}

void File::Flush() const {
  if (fsync(file_) != 0) Fail(path_, "cannot be flushed to the disk", errno);
}

}  // namespace shoal
