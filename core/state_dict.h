// Named tensors with their place in the global whole: what checkpoints store and load. No I/O here.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/module.h"

namespace shoal {

struct StateEntry {
  std::string name;  // "model/blocks.0.attention.q.weight", "optim/m/...", unique
  Tensor tensor;     // the slice that is here, contiguous; loading writes into it
  Dims global_shape;
  Dims offset;  // of the slice
  // If only a share of the slice is here: the tensor is one-dimensional and holds the slice's
  // elements from `begin` on.
  struct Share {
    Dims slice;  // its shape
    int64_t begin = 0;
  };
  std::optional<Share> share = std::nullopt;
};
using StateDict = std::vector<StateEntry>;

// The values of all parameters, named "model/" + their dotted names.
StateDict ModelState(Module& root);

// For I/O, which is the host's: `state` itself, or, where its tensors lie on a device, copies of
// them in host memory.
StateDict OnHost(const StateDict& state);
// read(state) of such copies, whose values then become the tensors'.
void ReadOnHost(const StateDict& state, const std::function<void(const StateDict&)>& read);

}  // namespace shoal
