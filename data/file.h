// Files as bytes: reading, with errors that name the file.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/base/atomic_file.h"
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

// The text files of `path`: itself, or all below it when it is a directory, sorted by their path
// in it. Names that begin with a dot are passed over, empty files too. Throws if none is left.
std::vector<std::string> ListTextFiles(const std::string& path);

// A text file, refused if it holds NUL bytes or if more than a tenth of it is not UTF-8, unless
// `binary` says that any bytes will do.
FileBytes ReadTextFile(const std::string& path, bool binary);

}  // namespace shoal
