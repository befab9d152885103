// The ranks as a grid of named axes, and the group of each axis through this rank. Tensor-parallel
// neighbours are next to each other, then come sequence and data parallelism, and pipeline stages
// lie furthest apart: the axes that talk most share a host.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "core/placement.h"
#include "parallel/communicator.h"

namespace shoal {

struct MeshShape {
  int dp = 1, tp = 1, pp = 1, cp = 1, ep = 1;
  int ranks() const { return dp * tp * pp * cp; }  // ep lies within dp x cp
};

class Mesh {
 public:
  // `world` must have shape.ranks() ranks and outlive the mesh. Collective.
  Mesh(Communicator& world, const MeshShape& shape);

  const MeshShape& shape() const { return shape_; }
  Communicator& world() const { return world_; }
  // The ranks that differ from this one in `axis` alone; kEp has no group yet.
  Communicator& axis(MeshAxis axis) const { return *axes_[static_cast<size_t>(axis)]; }
  // dp x cp: who shares parameters, and sums their gradients.
  Communicator& data() const { return *data_; }
  // tp x pp: who holds the parts of one replica's parameters.
  Communicator& model() const { return *model_; }
  int coordinate(MeshAxis axis) const { return coordinates_[static_cast<size_t>(axis)]; }
  // Sent by this rank in the axis' groups; scalars that steer the run, in any group.
  int64_t wire_bytes(MeshAxis axis) const;
  int64_t control_bytes() const;
  void set_profile(KernelProfile* profile) const;

 private:
  Communicator& world_;
  MeshShape shape_;
  std::array<int, kMeshAxes> coordinates_ = {};
  std::array<std::unique_ptr<Communicator>, kMeshAxes> axes_;
  std::unique_ptr<Communicator> data_, model_;

  std::vector<Communicator*> All() const;
};

}  // namespace shoal
