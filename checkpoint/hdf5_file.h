// The few HDF5 calls that a save needs. HDF5 lays a file out: where each array's bytes lie, and all
// that lies around them, so that every reader of HDF5 finds the arrays. The arrays' bytes go there
// by plain writes: a disk that fills up in the middle never meets the library, which could not go
// on after it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/base/dims.h"
#include "core/base/dtype.h"

namespace shoal {

// bf16 and f16 are stored as 16-bit integers; an attribute `dtype` names what they are (HDF5 1.10
// has no such types). Groups named in "a/b/c" are made as needed.
struct Hdf5Array {
  std::string name;
  DType dtype;
  Dims shape;
  int64_t bytes() const { return shape.numel() * static_cast<int64_t>(SizeOf(dtype)); }
};

// A range of a file.
struct Extent {
  int64_t at, bytes;
};
// What lies between the `arrays` (in any order, none inside another) in a file of `size` bytes.
// Empty arrays lie nowhere.
std::vector<Extent> Gaps(std::vector<Extent> arrays, int64_t size);

struct Hdf5Layout {
  std::vector<int64_t> offsets;  // of each array's bytes, which are contiguous; 0 if it is empty
  int64_t size = 0;              // of the file
  std::string frame;             // the bytes of all gaps, one after the other
};
// Error(kStorage) if this build has no HDF5.
Hdf5Layout LayOutHdf5(const std::vector<Hdf5Array>& arrays);

// One array, read by HDF5 itself. Error(kStorage) naming the file and the array.
void ReadHdf5(const std::string& path, const Hdf5Array& array, void* data);

}  // namespace shoal
