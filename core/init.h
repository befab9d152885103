// Initial values as a function of (seed, parameter name, global index): any sharding of a model
// draws the same numbers.
#pragma once

#include "core/module.h"

namespace shoal {

void InitParameter(const Parameter& parameter, uint64_t seed);

// Gives every parameter memory in `dtype` and its initial value.
void MaterializeParameters(Module& root, DType dtype, uint64_t seed);

}  // namespace shoal
