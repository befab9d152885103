#include "core/state_dict.h"

#include <algorithm>

#include "core/context.h"

namespace shoal {

StateDict ModelState(Module& root) {
  StateDict state;
  for (const auto& p : root.Parameters()) {
    state.push_back({"model/" + p->name(), p->value(), p->global_shape(), p->offset()});
  }
  return state;
}

namespace {

bool OnDevice(const StateDict& state) {
  return std::any_of(state.begin(), state.end(), [](const StateEntry& entry) {
    return entry.tensor.device().type == DeviceType::kCuda;
  });
}

}  // namespace

StateDict OnHost(const StateDict& state) {
  StateDict host = state;
  if (!OnDevice(state)) return host;
  {
    ExecutionContext context{Device{}};
    const ContextScope scope(context);
    for (StateEntry& entry : host)
      if (entry.tensor.device().type == DeviceType::kCuda)
        entry.tensor = Tensor::Empty(entry.tensor.shape(), entry.tensor.dtype());
  }
  for (size_t i = 0; i < state.size(); ++i)
    if (!host[i].tensor.is(state[i].tensor)) host[i].tensor.CopyFrom(state[i].tensor);
  return host;
}

void ReadOnHost(const StateDict& state, const std::function<void(const StateDict&)>& read) {
  if (!OnDevice(state)) return read(state);
  const StateDict host = OnHost(state);
  {
    ExecutionContext context{Device{}};
    const ContextScope scope(context);
    read(host);
  }
  for (size_t i = 0; i < state.size(); ++i)
    if (!host[i].tensor.is(state[i].tensor)) state[i].tensor.CopyFrom(host[i].tensor);
}

}  // namespace shoal
