#include "core/parameter.h"

namespace shoal {

Parameter::Parameter(const Dims& shape, std::vector<std::string> axes, InitSpec init)
    : global_shape_(shape), shape_(shape), axes_(std::move(axes)), init_(init) {
  SHOAL_CHECK(static_cast<int>(axes_.size()) == shape.rank(), "parameter", "{} axes for shape {}",
              axes_.size(), shape.ToString());
  for (int i = 0; i < shape.rank(); ++i) offset_.push_back(0);
}

void Parameter::TakeSlice(int dim, int64_t begin, int64_t count) {
  SHOAL_CHECK(!value_.defined(), name_, "cannot be cut after it has memory");
  SHOAL_CHECK(begin >= 0 && count >= 0 && begin + count <= shape_[dim], name_,
              "[{}, {}) of dimension {} of {}", begin, begin + count, dim, shape_.ToString());
  offset_[dim] += begin;
  shape_[dim] = count;
}

void Parameter::Materialize(DType dtype, MemoryClass memory_class) {
  leaf_ = std::make_shared<Leaf>(shape_, dtype);
  leaf_->name = name_;
  leaf_->interned_name = Intern(name_);
  const OriginScope here(leaf_->interned_name);
  value_ = Tensor::Empty(shape_, dtype, memory_class);
}

Tensor Parameter::Use() const {
  SHOAL_CHECK(value_.defined(), name_, "is used before it has memory");
  Tensor use = value_.Detached();
  use.set_placement(placement_);
  if (requires_grad_) use.set_node(leaf_);
  return use;
}

}  // namespace shoal
