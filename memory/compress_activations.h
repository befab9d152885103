// Activations in fewer bits between forward and backward. Gradients are then those of slightly
// other activations: of every value that is kept, the relative error is at most 2^-9 (bf16); or the
// error is at most 1/254 of the largest of its block of 64 in a row (int8; kernels/quantize.h).
// Forward, and so the loss of a step, is exact. Statistics (RecordOptions::exact) and parameters
// are kept as they are. Rounding is by value and by row: ranks that share out tokens or sequences
// round alike, and so do those that share out heads and columns where blocks do not lie across
// their bounds.
#pragma once

#include <string_view>

#include "core/saved_tensor.h"

namespace shoal {

enum class ActivationFormat {
  kOwn,   // as they are
  kBF16,  // half of f32
  kInt8,  // 1 + 4/64 bytes a value
};

ActivationFormat ParseActivationFormat(std::string_view name);  // "none", "bf16", "int8"

// `inner`, if given, keeps what is left: in a file, say.
SavedTensorHooks CompressActivations(ActivationFormat format, SavedTensorHooks inner = {});

}  // namespace shoal
