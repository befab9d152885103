#include "core/tensor.h"

#include <algorithm>
#include <cstring>

#include "core/autograd.h"
#include "core/base/build_config.h"
#include "kernels/copy.h"
#include "kernels/cuda_runtime.h"

namespace shoal {
namespace {

// A product that fits no int64 would pass for a small tensor.
size_t BytesOf(const Dims& shape, DType dtype) {
  bool empty = false;
  for (const int64_t extent : shape) {
    SHOAL_CHECK(extent >= 0, "tensor", "a negative extent in shape {}", shape.ToString());
    empty = empty || extent == 0;
  }
  if (empty) return 0;
  auto bytes = static_cast<int64_t>(SizeOf(dtype));
  for (const int64_t extent : shape) {
    SHOAL_CHECK(!__builtin_mul_overflow(bytes, extent, &bytes), "tensor",
                "shape {} of {} has more bytes than a number holds", shape.ToString(), Name(dtype));
  }
  return static_cast<size_t>(bytes);
}

}  // namespace

Tensor Tensor::Unmaterialized(const Dims& shape, DType dtype, MemoryClass memory_class) {
  const ExecutionContext& context = ExecutionContext::Current();
  const size_t bytes = BytesOf(shape, dtype);
  Impl impl;
  impl.storage =
      std::make_shared<Storage>(bytes, memory_class, BlockLabel{CurrentOrigin(), dtype, shape},
                                context.allocator(), context.device());
  impl.shape = shape;
  impl.strides = shape.RowMajorStrides();
  impl.dtype = dtype;
  return Tensor(std::move(impl));
}

Tensor Tensor::Empty(const Dims& shape, DType dtype, MemoryClass memory_class) {
  Tensor t = Unmaterialized(shape, dtype, memory_class);
  t.storage().Materialize();
  return t;
}

Tensor Tensor::Full(const Dims& shape, DType dtype, double value, MemoryClass memory_class) {
  Tensor t = Empty(shape, dtype, memory_class);
  t.Fill(value);
  return t;
}

Tensor Tensor::FromHost(const void* values, size_t count, const Dims& shape, DType dtype,
                        MemoryClass memory_class) {
  SHOAL_CHECK(static_cast<int64_t>(count) == shape.numel(), "tensor", "{} values for shape {}",
              count, shape.ToString());
  Tensor t = Empty(shape, dtype, memory_class);
  const size_t bytes = count * SizeOf(dtype);
  if (t.device().type == DeviceType::kCpu && bytes > 0)
    std::memcpy(t.storage().data(), values, bytes);
  if constexpr (kHaveCuda) {
    if (t.device().type == DeviceType::kCuda) {
      cuda::CopyToDevice(ExecutionContext::Current().stream().handle, t.storage().data(), values,
                         bytes);
    }
  }
  return t;
}

bool Tensor::contiguous() const {
  int64_t step = 1;
  for (int i = rank() - 1; i >= 0; --i) {
    if (shape()[i] != 1 && strides()[i] != step) return false;
    step *= shape()[i];
  }
  return true;
}

bool Tensor::SameElements(const Tensor& other) const {
  return defined() && other.defined() && &storage() == &other.storage() &&
         view().data == other.view().data && shape() == other.shape() &&
         strides() == other.strides() && dtype() == other.dtype();
}

shoal::View Tensor::view() const {
  shoal::View v;
  if (!defined()) return v;
  impl_->storage->Restore();
  SHOAL_CHECK(impl_->storage->data() != nullptr, "tensor",
              "a tensor of shape {} is used while its memory is released", shape().ToString());
  v.data = static_cast<char*>(impl_->storage->data()) +
           impl_->offset * static_cast<int64_t>(SizeOf(dtype()));
  v.dtype = dtype();
  v.device = device();
  v.shape = shape();
  v.strides = strides();
  return v;
}

Tensor::Impl Tensor::Detach() const {
  Impl impl = *impl_;
  impl.node = nullptr;
  return impl;
}

Tensor Tensor::Detached() const { return defined() ? Tensor(Detach()) : Tensor(); }

Tensor Tensor::Reshaped(const Dims& shape) const {
  SHOAL_CHECK(contiguous(), "reshape", "a tensor of shape {} is not contiguous",
              this->shape().ToString());
  Dims resolved = shape;
  int64_t known = 1;
  int unknown = -1;
  for (int i = 0; i < shape.rank(); ++i) {
    if (shape[i] == -1) {
      unknown = i;
    } else {
      known *= shape[i];
    }
  }
  if (unknown >= 0) resolved[unknown] = known ? numel() / known : 0;
  SHOAL_CHECK(resolved.numel() == numel(), "reshape", "{} does not fit {}",
              this->shape().ToString(), shape.ToString());
  Impl impl = Detach();
  impl.shape = resolved;
  impl.strides = resolved.RowMajorStrides();
  return Tensor(std::move(impl));
}

Tensor Tensor::Narrowed(int dim, int64_t begin, int64_t count) const {
  SHOAL_CHECK(begin >= 0 && count >= 0 && begin + count <= shape()[dim], "narrow",
              "[{}, {}) of dimension {} of {}", begin, begin + count, dim, shape().ToString());
  Impl impl = Detach();
  impl.shape[dim] = count;
  impl.offset += begin * strides()[dim];
  return Tensor(std::move(impl));
}

Tensor Tensor::Transposed(int a, int b) const {
  Impl impl = Detach();
  std::swap(impl.shape[a], impl.shape[b]);
  std::swap(impl.strides[a], impl.strides[b]);
  return Tensor(std::move(impl));
}

Tensor Tensor::Clone(MemoryClass memory_class) const { return To(dtype(), memory_class); }

Tensor Tensor::To(DType dtype, MemoryClass memory_class) const {
  Tensor out = Empty(shape(), dtype, memory_class);
  out.CopyFrom(*this);
  out.set_placement(placement());
  return out;
}

void Tensor::CopyFrom(const Tensor& source) const {
  if constexpr (kHaveCuda) {
    const bool counting = ExecutionContext::Current().stream().counting();
    if (device() != source.device() && !counting) return CopyAcross(source);
  }
  kernels::Copy(ExecutionContext::Current().stream(), view(), source.view());
}

// Between the host and a device, on whose stream this thread queues.
void Tensor::CopyAcross(const Tensor& source) const {
  SHOAL_CHECK(
      dtype() == source.dtype() && shape() == source.shape() && contiguous() && source.contiguous(),
      "copy", "between {} and {}: both must be contiguous, of one shape and dtype",
      Name(source.device().type), Name(device().type));
  const Stream& stream = ExecutionContext::Current().stream();
  const bool to_device = device().type == DeviceType::kCuda;
  SHOAL_CHECK(stream.device == (to_device ? device() : source.device()), "copy",
              "this thread does not compute on the device");
  if (numel() == 0) return;
  if constexpr (kHaveCuda) {
    if (to_device) {
      cuda::CopyToDevice(stream.handle, view().data, source.view().data, bytes());
    } else {
      cuda::CopyToHost(stream.handle, view().data, source.view().data, bytes());
    }
  }
}

void Tensor::Fill(double value) const {
  kernels::Fill(ExecutionContext::Current().stream(), view(), value);
}

double Tensor::Item() const {
  SHOAL_CHECK(numel() == 1, "item", "shape {} holds more than one value", shape().ToString());
  return ToVector()[0];
}

std::vector<double> Tensor::ToVector() const {
  std::vector<double> values(static_cast<size_t>(numel()));
  if (device().type == DeviceType::kMeta || values.empty()) return values;
  const Tensor wide =
      dtype() == DType::kF64 && contiguous() ? *this : To(DType::kF64, MemoryClass::kWorkspace);
  const size_t bytes = values.size() * sizeof(double);
  if (device().type == DeviceType::kCpu) std::memcpy(values.data(), wide.view().data, bytes);
  if constexpr (kHaveCuda) {
    if (device().type == DeviceType::kCuda) {
      void* stream = ExecutionContext::Current().stream().handle;
      cuda::CopyToHost(stream, values.data(), wide.view().data, bytes);
    }
  }
  return values;
}

const std::shared_ptr<Node>& Tensor::node() const { return impl_->node; }
void Tensor::set_node(std::shared_ptr<Node> node) const { impl_->node = std::move(node); }

}  // namespace shoal
