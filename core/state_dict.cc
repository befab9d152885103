#include "core/state_dict.h"

namespace shoal {

StateDict ModelState(Module& root) {
  StateDict state;
  for (const auto& p : root.Parameters()) {
    state.push_back({"model/" + p->name(), p->value(), p->global_shape(), p->offset()});
  }
  return state;
}

}  // namespace shoal
