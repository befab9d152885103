// Weights that are narrower than their masters, in either form of these (ZeroOptions): a run whose
// masters are whole goes on from a save whose masters are split, and the other way round.
#pragma once

#include <string>

#include "checkpoint/store.h"
#include "core/state_dict.h"

namespace shoal {

// The name that a tensor of a save has, and a split master would have if it were whole.
std::string WholeMaster(const std::string& name);

// As LoadState, whichever form the save's masters have. Bits of masters are kept.
void LoadRunState(const std::string& save, const StateDict& state);

// `weights`, named "model/...", as exact as the save has them: of masters where there are any.
void LoadExact(SaveReader& save, const StateDict& weights);

}  // namespace shoal
