// Partitioned activations (ZeRO-R's Pa; Rajbhandari et al., arXiv 1910.02054, section 6.1): of what
// all tensor-parallel ranks hold alike and keep for backward, each keeps its part; an all-gather
// brings the whole back when backward asks for it.
#pragma once

#include "core/saved_tensor.h"
#include "parallel/communicator.h"

namespace shoal {

// Hooks for the forwards of ranks of `group`, which lies along a mesh axis and must outlive the
// graph. Tensors that differ between the ranks (core/placement.h) are kept as they are. `inner`, if
// given, keeps the parts and those: in a file, say (ZeRO-R's Pa to the host).
SavedTensorHooks PartitionActivations(Communicator& group, SavedTensorHooks inner = {});

}  // namespace shoal
