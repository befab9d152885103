#include "parallel/mesh.h"

#include "core/base/error.h"

namespace shoal {
namespace {

// Coordinates in the order pp, dp, cp, tp, the last one running fastest.
struct Place {
  int pp, dp, cp, tp;
};
Place PlaceOf(const MeshShape& s, int rank) {
  return {rank / (s.tp * s.cp * s.dp), rank / (s.tp * s.cp) % s.dp, rank / s.tp % s.cp,
          rank % s.tp};
}

}  // namespace

Mesh::Mesh(Communicator& world, const MeshShape& shape) : world_(world), shape_(shape) {
  SHOAL_CHECK(shape.ranks() == world.size(), "mesh", "a mesh of {} ranks on {}", shape.ranks(),
              world.size());
  const Place me = PlaceOf(shape, world.rank());
  coordinates_ = {me.dp, me.tp, me.pp, me.cp, 0};
  // Those whose place agrees with mine in all that `same` compares.
  const auto group = [&](auto&& same) {
    std::vector<int> members;
    for (int r = 0; r < world.size(); ++r)
      if (same(PlaceOf(shape, r))) members.push_back(r);
    return world.Subgroup(members);
  };
  const auto set = [&](MeshAxis axis, auto&& same) {
    axes_[static_cast<size_t>(axis)] = group(same);
    axes_[static_cast<size_t>(axis)]->set_axis(axis);
  };
  set(MeshAxis::kDp,
      [&](const Place& p) { return p.pp == me.pp && p.cp == me.cp && p.tp == me.tp; });
  set(MeshAxis::kTp,
      [&](const Place& p) { return p.pp == me.pp && p.dp == me.dp && p.cp == me.cp; });
  set(MeshAxis::kPp,
      [&](const Place& p) { return p.dp == me.dp && p.cp == me.cp && p.tp == me.tp; });
  set(MeshAxis::kCp,
      [&](const Place& p) { return p.pp == me.pp && p.dp == me.dp && p.tp == me.tp; });
  data_ = group([&](const Place& p) { return p.pp == me.pp && p.tp == me.tp; });
  model_ = group([&](const Place& p) { return p.dp == me.dp && p.cp == me.cp; });
}

std::vector<Communicator*> Mesh::All() const {
  std::vector<Communicator*> all = {&world_, data_.get(), model_.get()};
  for (const auto& axis : axes_) {
    if (axis != nullptr) all.push_back(axis.get());
  }
  return all;
}

int64_t Mesh::wire_bytes(MeshAxis axis) const {
  const auto& group = axes_[static_cast<size_t>(axis)];
  const int64_t bytes = group == nullptr ? 0 : group->wire_bytes(Traffic::kData);
  return bytes + (axis == MeshAxis::kDp ? data_->wire_bytes(Traffic::kData) : 0);
}

int64_t Mesh::control_bytes() const {
  int64_t bytes = 0;
  for (const Communicator* c : All()) bytes += c->wire_bytes(Traffic::kControl);
  return bytes;
}

void Mesh::set_profile(KernelProfile* profile) const {
  for (Communicator* c : All()) c->set_profile(profile);
}

}  // namespace shoal
