#include "core/placement.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "core/autograd.h"
#include "core/placement_rules.h"

namespace shoal {
namespace {

using Kind = AxisPlacement::Kind;

AxisPlacement On(const Tensor& t, MeshAxis axis) { return t.placement()[axis]; }

// Of the parameter nearest above `t`, or "".
std::string Upstream(const Tensor& t) {
  std::vector<const Node*> level = {t.node().get()};
  for (int depth = 0; depth < 1000 && !level.empty(); ++depth) {
    std::vector<const Node*> next;
    for (const Node* node : level) {
      if (node == nullptr) continue;
      if (node->is_leaf() && !static_cast<const Leaf*>(node)->name.empty())
        return static_cast<const Leaf*>(node)->name;
      for (const auto& input : node->inputs()) {
        if (std::find(next.begin(), next.end(), input.get()) == next.end())
          next.push_back(input.get());
      }
    }
    level = std::move(next);
  }
  return "";
}

std::string Describe(const Tensor& t) {
  if (t.node() == nullptr) return "no gradient wanted";
  const std::string parameter = Upstream(t);
  if (t.node()->is_leaf()) return "parameter '" + parameter + "'";
  return fmt::format("the result of '{}'{}", t.node()->name(),
                     parameter.empty() ? "" : " after parameter '" + parameter + "'");
}

}  // namespace

const char* Name(MeshAxis axis) {
  static constexpr const char* kNames[] = {"dp", "tp", "pp", "cp", "ep"};
  return kNames[static_cast<int>(axis)];
}

AxisPlacement AxisPlacement::OfGradient() const {
  if (kind == kReplicated) return {kPartial};
  if (kind == kPartial) return {kReplicated};
  return *this;
}

std::string AxisPlacement::ToString() const {
  static constexpr const char* kNames[] = {"invariant", "replicated", "sharded", "partial",
                                           "varying"};
  return kind == kSharded ? fmt::format("sharded({})", dim) : kNames[kind];
}

void FailPlacement(const char* op, MeshAxis axis, const Tensor& operand, int number,
                   const std::string& what) {
  SHOAL_FAIL(ErrorKind::kBug, op, "on mesh axis {}: operand {} ({}, {}) {}", Name(axis), number,
             Describe(operand), On(operand, axis).ToString(), what);
}

AxisPlacement UniformPlacement(const char* op, MeshAxis axis, std::span<const Tensor> operands,
                               bool linear) {
  AxisPlacement result;
  bool differs = false, partial = false;
  for (const Tensor& t : operands) {
    if (!t.defined()) continue;
    const AxisPlacement p = On(t, axis);
    differs = differs || p.kind != Kind::kInvariant;
    partial = partial || p.kind == Kind::kPartial;
  }
  if (!differs) return result;
  for (size_t i = 0; i < operands.size(); ++i) {
    const Tensor& t = operands[i];
    if (!t.defined()) continue;
    const AxisPlacement p = On(t, axis);
    const int number = static_cast<int>(i);
    if (p.kind == Kind::kPartial && !linear)
      FailPlacement(op, axis, t, number,
                    "is used as if it were whole: it is one rank's part of a sum that nobody has "
                    "taken (collectives::AllReduce or ReduceScatter)");
    if (partial && p.kind != Kind::kPartial)
      FailPlacement(op, axis, t, number,
                    "meets a part of a sum: the sum over the ranks would count it on each");
    if (partial) {
      result = {Kind::kPartial};
      continue;
    }
    if (p.kind == Kind::kInvariant) {
      if (t.node() != nullptr)
        FailPlacement(
            op, axis, t, number,
            "meets values that differ between the ranks: each rank would have a part of "
            "its gradient, and nobody sums them (collectives::Enter, or a gradient sum of "
            "the parameter)");
      continue;  // a constant
    }
    if (p.kind == Kind::kVarying || result.kind == Kind::kVarying) {
      result = {Kind::kVarying};
    } else if (p.kind == Kind::kSharded) {
      if (result.kind == Kind::kSharded && result.dim != p.dim)
        FailPlacement(op, axis, t, number,
                      fmt::format("meets an operand that is {}", result.ToString()));
      result = p;
    } else if (result.kind == Kind::kInvariant) {
      result = p;
    }
  }
  return result;
}

Placement UniformPlacement(const char* op, std::span<const Tensor> operands, bool linear) {
  return PlacePerAxis(operands,
                      [&](MeshAxis axis) { return UniformPlacement(op, axis, operands, linear); });
}

Placement VaryingLike(std::span<const Tensor> operands) {
  return PlacePerAxis(operands, [&](MeshAxis axis) -> AxisPlacement {
    for (const Tensor& t : operands)
      if (t.defined() && !On(t, axis).SameOnAllRanks()) return {Kind::kVarying};
    return {};
  });
}

void CheckWholeRows(const char* op, const Tensor& x) {
  if (x.placement().invariant()) return;
  for (const MeshAxis axis : kAllMeshAxes) {
    if (On(x, axis) == AxisPlacement::Sharded(x.rank() - 1))
      FailPlacement(op, axis, x, 0, "has only a part of each row here, and all of it is needed");
  }
}

Placement ReshapedPlacement(const char* op, const Tensor& x, const Dims& shape) {
  return PlacePerAxis(std::span(&x, 1), [&](MeshAxis axis) -> AxisPlacement {
    const AxisPlacement p = UniformPlacement(op, axis, std::span(&x, 1), true);
    if (p.kind != Kind::kSharded) return p;
    const auto same_before = [&](int d) {
      if (d >= shape.rank()) return false;
      for (int i = 0; i < d; ++i)
        if (shape[i] != x.dim(i)) return false;
      return (shape[d] == 1) == (x.dim(d) == 1);
    };
    if (same_before(p.dim)) return p;
    // One row of a split dimension here: it may have gone into the one before or behind it.
    if (x.dim(p.dim) == 1) return {Kind::kVarying};
    // The dimension that begins where this one did: as many elements in front of it.
    int64_t before = 1, at = 1;
    for (int i = 0; i < p.dim; ++i) before *= x.dim(i);
    int found = -1;
    for (int i = 0; i < shape.rank(); at *= shape[i++]) {
      if (at != before) continue;
      if (found >= 0) return {Kind::kVarying};  // extents of 1 or 0 leave it open
      found = i;
    }
    return found < 0 ? AxisPlacement{Kind::kVarying} : AxisPlacement::Sharded(found);
  });
}

}  // namespace shoal
