// Activations outside memory between forward and backward: what ops keep is written to a file that
// is mapped into memory, and read back one tensor ahead in the reverse order. Tensors that are
// smaller than a page's worth of trouble stay.
#pragma once

#include <memory>

#include "core/mapped_file.h"
#include "core/saved_tensor.h"

namespace shoal {

// `file` must outlive the graphs whose tensors it holds.
SavedTensorHooks OffloadActivations(std::shared_ptr<MappedFile> file);

}  // namespace shoal
