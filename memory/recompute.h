// Activation recomputation. Full (Chen et al., arXiv 1604.06174): a module keeps its input alone,
// and its forward is run again when its gradient is needed. Attention keeps its output and its row
// statistics too (core/keep.h): the dearest part is computed once. Of a block's forward all is run
// again but the MLP's last product and what follows it, its sum over tensor-parallel ranks too.
// Dropout replays exactly, since its mask is a function of token and column.
//
// Selective, after Korthikanti et al. (arXiv 2205.05198, section 5), for attention that keeps no
// scores: only what is cheap per byte is computed again, the results of norms and activation
// functions. Of LLaMA's s b (16 h + 6 f) bytes a block in bf16, s b (12 h + 4 f) stay; of GPT-2's
// s b (16 h + 4 f), s b (12 h + 2 f).
#pragma once

#include "core/module.h"

namespace shoal {

// To be applied before hooks that gather the module's parameters: a replay runs inside them, in
// backward. A parameter may be used by one such module only.
// `snapshot` is called with each forward, and what it returns before the replay of that forward:
// for what a forward depends on beside its input.
void ApplyRecompute(Module& module, std::function<std::function<void()>()> snapshot = {});

void ApplySelectiveRecompute(Module& module);

}  // namespace shoal
