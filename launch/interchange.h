// Models from and to Hugging Face directories, tensor by tensor, whatever layout wrote the save:
// the memory is that of some copies of the largest tensor, and never the model's.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/base/dtype.h"

namespace shoal {

struct Interchange {
  std::string path;                // that was made
  std::vector<std::string> files;  // in it, that hold tensors
  int64_t tensors = 0, bytes = 0;
  DType dtype = DType::kF32;
};

struct ExportOptions {
  // Left out: of the run's weights. A wider one than that is taken from the optimizer's masters,
  // if the save has them.
  std::optional<DType> dtype;
  std::optional<std::string> tokenizer;  // left out: the run's
  int64_t shard_bytes = 5'000'000'000;   // of a file, unless one tensor is larger
};

// Both write under a temporary name first and refuse a path that is taken; Error(kStorage), or
// Error(kConfig) where the other side cannot say what the model is.

// The weights of a save as a Hugging Face directory.
Interchange ExportHuggingFace(const std::string& save, const std::string& out,
                              const ExportOptions& options);
// A Hugging Face directory as a save of step 0, in the dtype of its embedding.
Interchange ImportHuggingFace(const std::string& directory, const std::string& out);

}  // namespace shoal
