// Files as bytes: reading with errors that name the file, and writing that is whole or absent.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/base/error.h"

namespace shoal {

// The bytes of a regular file, read-only; copies share them. Files up to `copy_limit` are read
// into memory, so an edit during a run cannot reach them. Larger ones are mapped: they cost no
// memory of their own and are shared by all ranks of a host, but must not be cut short while in
// use.
class FileBytes {
 public:
  static constexpr int64_t kCopyLimit = 64 << 20;

  FileBytes() = default;
  explicit FileBytes(const std::string& path, int64_t copy_limit = kCopyLimit);

  const char* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  std::shared_ptr<const void> owner() const { return data_; }
  std::string_view text() const { return {data(), static_cast<size_t>(size_)}; }

 private:
  std::shared_ptr<const char[]> data_;
  int64_t size_ = 0;
};

// Written under a temporary name; Commit makes it durable and gives it its own name. Destroyed
// without Commit, it leaves nothing behind.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void Write(const void* data, size_t bytes);
  void Flush();  // hands all to the file, so that it can be read by its temporary path
  void Commit();
  // For a library that writes by name; it must have closed the file before Commit.
  const std::string& temporary_path() const { return temporary_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_, temporary_;
  std::vector<char> buffer_;
  int file_ = -1;
};

// The text files of `path`: itself, or all below it when it is a directory, sorted by their path
// in it. Names that begin with a dot are passed over, empty files too. Throws if none is left.
std::vector<std::string> ListTextFiles(const std::string& path);

// A text file, refused if it holds NUL bytes or if more than a tenth of it is not UTF-8, unless
// `binary` says that any bytes will do.
FileBytes ReadTextFile(const std::string& path, bool binary);

}  // namespace shoal
