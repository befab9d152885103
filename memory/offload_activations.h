// Activations elsewhere between forward and backward: what ops keep goes to host memory (of ranks
// that compute on a device), or to a file that is mapped into it, read back one tensor ahead in the
// reverse order. Tensors that are smaller than a page's worth of trouble stay.
#pragma once

#include <memory>

#include "core/mapped_file.h"
#include "core/saved_tensor.h"

namespace shoal {

SavedTensorHooks OffloadActivations(std::shared_ptr<MappedFile> file);
SavedTensorHooks OffloadActivationsToHost();

}  // namespace shoal
