// A non-owning strided array: the currency of kernels.
#pragma once

#include <utility>

#include "core/base/device.h"
#include "core/base/dims.h"
#include "core/base/dtype.h"

namespace shoal {

struct View {
  void* data = nullptr;  // null: an optional argument that is absent
  DType dtype = DType::kF32;
  Device device;
  Dims shape;
  Dims strides;  // in elements; 0 repeats an element

  View() = default;
  View(void* data, DType dtype, Dims shape, Device device = {})
      : data(data), dtype(dtype), device(device), shape(shape), strides(shape.RowMajorStrides()) {}

  explicit operator bool() const { return data != nullptr; }
  int rank() const { return shape.rank(); }
  int64_t dim(int i) const { return shape[i]; }
  int64_t numel() const { return shape.numel(); }
  size_t bytes() const { return static_cast<size_t>(numel()) * SizeOf(dtype); }
  bool contiguous() const {
    int64_t step = 1;
    for (int i = rank() - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != step) return false;
      step *= shape[i];
    }
    return true;
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }

  View Transposed(int a = -2, int b = -1) const {
    View v = *this;
    std::swap(v.shape[a], v.shape[b]);
    std::swap(v.strides[a], v.strides[b]);
    return v;
  }
  // Rows [begin, begin + count) of dimension `dim`.
  View Narrow(int dim, int64_t begin, int64_t count) const {
    View v = *this;
    v.shape[dim] = count;
    v.data = static_cast<char*>(data) + begin * strides[dim] * static_cast<int64_t>(SizeOf(dtype));
    return v;
  }
};

}  // namespace shoal
