// Named tensors with their place in the global whole: what checkpoints store and load. No I/O here.
#pragma once

#include <string>
#include <vector>

#include "core/module.h"

namespace shoal {

struct StateEntry {
  std::string name;  // "model/blocks.0.attention.q.weight", "optim/m/...", unique
  Tensor tensor;     // the slice that is here; loading writes into it
  Dims global_shape;
  Dims offset;  // of the slice
};
using StateDict = std::vector<StateEntry>;

// The values of all parameters, named "model/" + their dotted names.
StateDict ModelState(Module& root);

}  // namespace shoal
