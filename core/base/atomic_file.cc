#include "core/base/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "core/base/error.h"

namespace shoal {
namespace {

namespace fs = std::filesystem;

constexpr size_t kWriteBuffer = 1 << 20;

std::string Reason() { return std::strerror(errno); }

}  // namespace

AtomicFile::AtomicFile(std::string path)
    : path_(std::move(path)), temporary_(fmt::format("{}.partial-{}", path_, getpid())) {
  file_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file_ < 0) SHOAL_FAIL(ErrorKind::kStorage, "write", "cannot write {}: {}", path_, Reason());
  buffer_.reserve(kWriteBuffer);
}

AtomicFile::~AtomicFile() {
  if (file_ < 0) return;
  close(file_);
  unlink(temporary_.c_str());
}

void AtomicFile::Write(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const size_t n = std::min(bytes, kWriteBuffer - buffer_.size());
    buffer_.insert(buffer_.end(), p, p + n);
    p += n;
    bytes -= n;
    if (buffer_.size() == kWriteBuffer) Flush();
  }
}

void AtomicFile::Flush() {
  for (size_t done = 0; done < buffer_.size();) {
    const ssize_t n = write(file_, buffer_.data() + done, buffer_.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) SHOAL_FAIL(ErrorKind::kStorage, "write", "cannot write {}: {}", path_, Reason());
    done += static_cast<size_t>(n);
  }
  buffer_.clear();
}

void AtomicFile::Commit() {
  Flush();
  const int file = std::exchange(file_, -1);
  bool good = fsync(file) == 0;
  good = close(file) == 0 && good;
  good = good && rename(temporary_.c_str(), path_.c_str()) == 0;
  if (!good) {
    const std::string reason = Reason();
    unlink(temporary_.c_str());
    SHOAL_FAIL(ErrorKind::kStorage, "write", "cannot write {}: {}", path_, reason);
  }
  const fs::path folder = fs::path(path_).parent_path();
  SyncDirectory(folder.empty() ? "." : folder.string());
}

void SyncDirectory(const std::string& path) {
  const int directory = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const bool synced = directory >= 0 && fsync(directory) == 0;
  const int error = errno;
  if (directory >= 0) close(directory);
  if (!synced && error != EINVAL && error != EACCES)
    SHOAL_FAIL(ErrorKind::kStorage, "write", "{}: cannot be flushed to the disk: {}", path,
               std::strerror(error));
}

}  // namespace shoal
