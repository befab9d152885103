// A trainable tensor and what the transforms know about it: its global shape, which slice is here,
// and a logical axis per dimension. Parallelism, methods, optimizers and checkpoints meet at this
// type.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/autograd.h"
#include "core/tensor.h"

namespace shoal {

// How initial values are drawn; see init.h.
struct InitSpec {
  enum class Kind { kZeros, kOnes, kNormal, kUniform };
  Kind kind = Kind::kZeros;
  double scale = 0;  // standard deviation, or bound
};

class Parameter {
 public:
  // `axes` names each dimension: "vocab", "embed", "heads", "kv_heads", "mlp", "position", ...
  Parameter(const Dims& shape, std::vector<std::string> axes, InitSpec init);

  const std::string& name() const { return name_; }  // dotted path from the root, set by Module
  void set_name(std::string name) { name_ = std::move(name); }
  const Dims& global_shape() const { return global_shape_; }
  const Dims& offset() const { return offset_; }  // of the slice that is here
  const Dims& shape() const { return shape_; }    // of that slice
  const std::vector<std::string>& axes() const { return axes_; }
  const InitSpec& init() const { return init_; }
  // Weight decay is for matrices; gains and biases are left alone.
  bool decays() const { return global_shape_.rank() >= 2; }

  // Keeps [begin, begin + count) of dimension `dim`. Before Materialize.
  void TakeSlice(int dim, int64_t begin, int64_t count);
  // Of a slice that other ranks hold too: only the elements [begin, begin + count) of it are to be
  // counted in norms, and saved, from here. By default all are.
  void set_owned(int64_t begin, int64_t count) { owned_ = {begin, count}; }
  // first and number
  std::pair<int64_t, int64_t> owned() const {
    return owned_.second < 0 ? std::pair{int64_t{0}, shape_.numel()} : owned_;
  }
  // Of a parameter whose gradient here is a part of a sum: replaces a part by the sum. Called once
  // before a gradient is exchanged, on all ranks in the same order.
  void set_gradient_sum(std::function<void(const Tensor&)> sum) { gradient_sum_ = std::move(sum); }
  const std::function<void(const Tensor&)>& gradient_sum() const { return gradient_sum_; }

  // What the slice is to the ranks of an axis. Where it is replicated, somebody has undertaken to
  // sum its gradient.
  const Placement& placement() const { return placement_; }
  void Place(MeshAxis axis, AxisPlacement placement) { placement_.Set(axis, placement); }

  // Obtains memory for the slice (values undefined; see InitParameter).
  void Materialize(DType dtype, MemoryClass memory_class = MemoryClass::kParameters);

  const Tensor& value() const { return value_; }
  // The value as an op's input: gradients arrive in leaf().grad.
  Tensor Use() const;
  Leaf& leaf() const { return *leaf_; }
  bool requires_grad() const { return requires_grad_; }
  void set_requires_grad(bool on) { requires_grad_ = on; }

 private:
  std::string name_;
  Dims global_shape_, offset_, shape_;
  std::vector<std::string> axes_;
  InitSpec init_;
  Placement placement_;
  Tensor value_;
  std::shared_ptr<Leaf> leaf_;
  std::function<void(const Tensor&)> gradient_sum_;
  std::pair<int64_t, int64_t> owned_ = {0, -1};
  bool requires_grad_ = true;
};

}  // namespace shoal
