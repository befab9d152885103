// Files of named tensors in the safetensors format (github.com/huggingface/safetensors): the length
// of a header in eight bytes, the header as JSON, then the tensors' bytes one after another. The
// format has no checksums: the header is held against the file, the values cannot be.
// Errors are Error(kStorage) naming the file and the tensor.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/base/atomic_file.h"
#include "core/base/dims.h"
#include "core/base/dtype.h"

namespace shoal {

class SafetensorsFile {
 public:
  struct Entry {
    std::string type;            // as the file names it: "F32", "BOOL", ..
    std::optional<DType> dtype;  // none: a type that Shoal does not have
    Dims shape;
    int64_t begin = 0, end = 0;  // bytes, behind the header
  };

  // Reads the header and checks all of it: afterwards every tensor lies in the file, and every byte
  // of the file in one tensor. Never takes more memory than a file of this size can ask for.
  // The file is open only while it is read: a model may have more shards than a process may have
  // files.
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return path_; }
  const std::map<std::string, Entry>& entries() const { return entries_; }
  // Reads the box [offset, offset + shape) of a tensor, in its own dtype and row-major, and nothing
  // else of the file. Returns the bytes.
  int64_t Read(const std::string& name, const Dims& offset, const Dims& shape, void* data) const;

 private:
  std::string path_;
  int64_t data_begin_ = 0, size_ = 0;  // of the file
  std::map<std::string, Entry> entries_;
};

// Writes a file of tensors whose names, dtypes and shapes are known beforehand, one at a time. The
// file appears under its name when it is complete and on the disk.
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    DType dtype;
    Dims shape;
    int64_t bytes() const { return shape.numel() * static_cast<int64_t>(SizeOf(dtype)); }
  };
  SafetensorsWriter(const std::string& path, std::vector<Entry> entries);
  // The entries in their order, row-major.
  void Write(const std::string& name, const void* data);
  void Commit();

 private:
  AtomicFile file_;
  std::vector<Entry> entries_;
  size_t next_ = 0;
};

}  // namespace shoal
