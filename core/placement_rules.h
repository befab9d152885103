// The rules by which ops derive the placement of their result. An op's operands are given in the
// order in which its errors number them; undefined ones are passed over.
#pragma once

#include <span>
#include <string>

#include "core/tensor.h"

namespace shoal {

// Throws an Error of `op` that names the axis and the parameter that `operand` comes from.
[[noreturn]] void FailPlacement(const char* op, MeshAxis axis, const Tensor& operand, int number,
                                const std::string& what);

// Of an op that treats all elements alike: operands agree, or are the same on all ranks. `linear`:
// in all its operands together, so that parts of a sum give a part of the sum.
Placement UniformPlacement(const char* op, std::span<const Tensor> operands, bool linear = false);
AxisPlacement UniformPlacement(const char* op, MeshAxis axis, std::span<const Tensor> operands,
                               bool linear = false);

// rule(axis) -> AxisPlacement, for the axes on which the operands are not all invariant.
template <class F>
Placement PlacePerAxis(std::span<const Tensor> operands, F&& rule) {
  Placement result;
  bool invariant = true;
  for (const Tensor& t : operands)
    invariant = invariant && (!t.defined() || t.placement().invariant());
  if (invariant) return result;
  for (const MeshAxis axis : kAllMeshAxes) {
    for (const Tensor& t : operands) {
      if (!t.defined() || t.placement()[axis].kind == AxisPlacement::kInvariant) continue;
      result.Set(axis, rule(axis));
      break;
    }
  }
  return result;
}

// Operand `number` must have its rows (the last dimension) whole: what is computed depends on all
// of a row.
void CheckWholeRows(const char* op, const Tensor& x);

// Varying where an operand differs between the ranks, else invariant.
Placement VaryingLike(std::span<const Tensor> operands);

// After a reshape.
Placement ReshapedPlacement(const char* op, const Tensor& x, const Dims& shape);

}  // namespace shoal
