// What a value is to the ranks of each mesh axis, and what its gradient is:
//
//   placement     the value                                gradient
//   invariant     the same on all ranks                    invariant
//   replicated    the same on all ranks                    partial: nobody has summed it yet
//   sharded(d)    parts of a whole, along dimension d      sharded(d)
//   partial       what is meant is the sum over the ranks  replicated
//   varying       each rank has its own                    varying
//
// Tensors carry it, ops pass it on by their rule (Record), collectives change it. An op that would
// take a part of a sum for the sum, or leave a gradient as a part of a sum that nobody takes, is an
// Error at the first step that names the op, the axis and the parameter. After the SPMD types of
// JAX's shard_map and of torchtitan.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace shoal {

enum class MeshAxis { kDp, kTp, kPp, kCp, kEp };
inline constexpr std::array kAllMeshAxes = {MeshAxis::kDp, MeshAxis::kTp, MeshAxis::kPp,
                                            MeshAxis::kCp, MeshAxis::kEp};
constexpr int kMeshAxes = kAllMeshAxes.size();
const char* Name(MeshAxis axis);

struct AxisPlacement {
  enum Kind : uint8_t { kInvariant, kReplicated, kSharded, kPartial, kVarying };
  Kind kind = kInvariant;
  uint8_t dim = 0;  // of kSharded

  static AxisPlacement Sharded(int dim) { return {kSharded, static_cast<uint8_t>(dim)}; }
  AxisPlacement OfGradient() const;
  bool SameOnAllRanks() const { return kind == kInvariant || kind == kReplicated; }
  bool operator==(const AxisPlacement&) const = default;
  std::string ToString() const;
};

class Placement {
 public:
  AxisPlacement operator[](MeshAxis axis) const { return axes_[static_cast<size_t>(axis)]; }
  void Set(MeshAxis axis, AxisPlacement placement) {
    axes_[static_cast<size_t>(axis)] = placement;
    invariant_ = *this == Placement();
  }
  bool invariant() const { return invariant_; }  // on every axis
  bool operator==(const Placement& other) const { return axes_ == other.axes_; }

 private:
  std::array<AxisPlacement, kMeshAxes> axes_ = {};
  bool invariant_ = true;
};

}  // namespace shoal
