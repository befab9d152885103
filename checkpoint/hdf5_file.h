// The few HDF5 calls that a checkpoint needs: named contiguous arrays in one file.
#pragma once

#include <memory>
#include <string>

#include "core/base/dims.h"
#include "core/base/dtype.h"

namespace shoal {

// Errors are Error(kStorage) naming the file and the array. bf16 and f16 are stored as 16-bit
// integers with an attribute `dtype` (HDF5 1.10 has no such types).
class Hdf5File {
 public:
  static Hdf5File Create(const std::string& path);
  static Hdf5File Open(const std::string& path);
  ~Hdf5File();
  Hdf5File(Hdf5File&&) noexcept;

  // Groups named in "a/b/c" are made as needed.
  void Write(const std::string& name, DType dtype, const Dims& shape, const void* data);
  // The array must have this dtype and shape.
  void Read(const std::string& name, DType dtype, const Dims& shape, void* data) const;
  void Close();  // reports what only closing finds (a full disk)

 private:
  Hdf5File(std::string path, int64_t id) : path_(std::move(path)), id_(id) {}
  std::string path_;
  int64_t id_;
};

}  // namespace shoal
