// A strided array in ref-counted storage. Copying a Tensor shares it.
#pragma once

#include <atomic>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <vector>

#include "core/allocator.h"
#include "core/base/view.h"
#include "core/context.h"
#include "core/placement.h"

namespace shoal {

class Node;

// Memory that tensors share. It may be given up and obtained again while tensors refer to it: that
// is how ZeRO 3 frees the parameters of a block between uses. It may also be on its way from other
// ranks. Whoever gives it up or sends for it says how it becomes whole when a tensor is looked at.
class Storage {
 public:
  Storage(size_t bytes, MemoryClass memory_class, const BlockLabel& label,
          std::shared_ptr<Allocator> allocator, Device device)
      : bytes_(bytes),
        memory_class_(memory_class),
        label_(label),
        allocator_(std::move(allocator)),
        device_(device),
        written_(Now() + 1) {}
  ~Storage() { Release(); }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void Materialize() {
    if (data_ == nullptr) data_ = allocator_->Allocate(bytes_, memory_class_, label_);
  }
  void Release() {
    if (data_ != nullptr) allocator_->Free(data_);
    data_ = nullptr;
  }
  void set_restore(std::function<void()> restore) { restore_ = std::move(restore); }
  // Its values are still arriving.
  void set_pending(bool pending) { pending_ = pending; }
  void Arrive() const {
    if (pending_ && restore_) restore_();
  }
  void Restore() const {
    if ((data_ == nullptr || pending_) && restore_) restore_();
  }
  void* data() const { return data_; }  // null while released
  size_t bytes() const { return bytes_; }
  MemoryClass memory_class() const { return memory_class_; }
  Device device() const { return device_; }

  // A clock of the process that goes on with each op that writes its result.
  static uint64_t Now() { return clock.load(std::memory_order_relaxed); }
  // When it was made or, if that was later, an op's result was last written to it.
  uint64_t written() const { return written_; }
  void Written() { written_ = clock.fetch_add(1, std::memory_order_relaxed) + 1; }

 private:
  static inline std::atomic<uint64_t> clock{0};

  void* data_ = nullptr;
  bool pending_ = false;
  size_t bytes_;
  MemoryClass memory_class_;
  BlockLabel label_;  // of every block that it obtains
  std::shared_ptr<Allocator> allocator_;
  Device device_;
  uint64_t written_;
  std::function<void()> restore_;
};

class Tensor {
 public:
  Tensor() = default;  // undefined: no shape, no storage

  // On the current context's device, uninitialised.
  static Tensor Empty(const Dims& shape, DType dtype,
                      MemoryClass memory_class = MemoryClass::kActivations);
  // Has a shape but no memory until storage().Materialize().
  static Tensor Unmaterialized(const Dims& shape, DType dtype, MemoryClass memory_class);
  static Tensor Full(const Dims& shape, DType dtype, double value,
                     MemoryClass memory_class = MemoryClass::kActivations);
  // Copies host values; T is the dtype's own type.
  template <class T>
  static Tensor From(std::span<const T> values, const Dims& shape,
                     MemoryClass memory_class = MemoryClass::kActivations) {
    return FromHost(values.data(), values.size(), shape, DTypeOf<T>::value, memory_class);
  }
  template <class T>
  static Tensor From(const std::vector<T>& values, const Dims& shape,
                     MemoryClass memory_class = MemoryClass::kActivations) {
    return From(std::span<const T>(values), shape, memory_class);
  }

  bool defined() const { return impl_ != nullptr; }
  const Dims& shape() const { return impl_->shape; }
  const Dims& strides() const { return impl_->strides; }
  int rank() const { return impl_->shape.rank(); }
  int64_t dim(int i) const { return impl_->shape[i]; }
  int64_t numel() const { return impl_->shape.numel(); }
  size_t bytes() const { return static_cast<size_t>(numel()) * SizeOf(dtype()); }
  DType dtype() const { return impl_->dtype; }
  Device device() const { return impl_->storage->device(); }
  bool contiguous() const;
  Storage& storage() const { return *impl_->storage; }
  // No other tensor shares the memory: it may be overwritten.
  bool exclusive() const { return impl_.use_count() == 1 && impl_->storage.use_count() == 1; }
  bool is(const Tensor& other) const { return impl_ == other.impl_; }
  // Both are there, and are the same elements of the same memory in the same shape.
  bool SameElements(const Tensor& other) const;

  // For kernels. An undefined tensor gives an absent view.
  shoal::View view() const;
  // Of a CPU tensor.
  template <class T>
  T* data() const {
    return static_cast<T*>(view().data);
  }

  // Same storage, without a place in the graph. (ops.h has the differentiable forms.)
  Tensor Reshaped(const Dims& shape) const;  // contiguous only; one dimension may be -1
  Tensor Narrowed(int dim, int64_t begin, int64_t count) const;
  Tensor Transposed(int a, int b) const;
  Tensor Detached() const;

  Tensor Clone(MemoryClass memory_class = MemoryClass::kActivations) const;  // contiguous copy
  Tensor To(DType dtype, MemoryClass memory_class = MemoryClass::kActivations) const;
  // Same shape; converts. Between the host and this thread's device contiguous, of one dtype.
  void CopyFrom(const Tensor& source) const;
  void Fill(double value) const;

  // Waits for the device. On `meta` the values are zeros.
  double Item() const;
  std::vector<double> ToVector() const;

  // The graph: null when no gradient is wanted.
  const std::shared_ptr<Node>& node() const;
  void set_node(std::shared_ptr<Node> node) const;
  // What it is to other ranks. Views and copies have that of their source.
  const Placement& placement() const { return impl_->placement; }
  void set_placement(const Placement& placement) const { impl_->placement = placement; }

 private:
  struct Impl {
    std::shared_ptr<Storage> storage;
    int64_t offset = 0;  // elements
    Dims shape, strides;
    DType dtype = DType::kF32;
    Placement placement;
    std::shared_ptr<Node> node;
  };
  explicit Tensor(Impl impl) : impl_(std::make_shared<Impl>(std::move(impl))) {}
  static Tensor FromHost(const void* values, size_t count, const Dims& shape, DType dtype,
                         MemoryClass memory_class);
  Impl Detach() const;
  void CopyAcross(const Tensor& source) const;

  std::shared_ptr<Impl> impl_;
};

}  // namespace shoal
