// Activation recomputation (Chen et al., arXiv 1604.06174): a module keeps its input alone, and its
// forward is run again when its gradient is needed. Attention keeps its output and its row
// statistics too (core/keep.h): the dearest part is computed once. Dropout replays exactly, since
// its mask is a function of token and column.
#pragma once

#include "core/module.h"

namespace shoal {

// To be applied before hooks that gather the module's parameters: a replay runs inside them, in
// backward. A parameter may be used by one such module only.
// `snapshot` is called with each forward, and what it returns before the replay of that forward:
// for what a forward depends on beside its input.
void ApplyRecompute(Module& module, std::function<std::function<void()>()> snapshot = {});

}  // namespace shoal
