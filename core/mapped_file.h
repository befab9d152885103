// Tensors in a file that is mapped into memory: the host's memory holds what is in use, what is
// read ahead and what is written behind, and the system may drop any page in between. The file has
// no name, so a killed process leaves nothing.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/base/view.h"
#include "core/context.h"

namespace shoal {

class MappedFile {
 public:
  // In the folder `dir`, for `what` (in errors). Error(kStorage) if no file can be made there.
  MappedFile(const std::string& dir, const std::string& what);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Tensors that are made while it is current lie in the file. Its space is taken at once, and used
  // again for a tensor of the same size: Error(kStorage) with the numbers if there is not enough.
  // They are the host's, whatever this rank computes on; on `meta` they are only counted.
  ExecutionContext& context() { return *context_; }

  // `views` are used next: begins to read them.
  void Prefetch(std::span<const View> views) const;
  // `views` are not used for a while: begins to write them, and lets the last ones that were
  // retired go from memory.
  void Retire(std::span<const View> views);
  // All that was retired leaves memory.
  void Settle();

 private:
  class Mapping;
  std::shared_ptr<Mapping> mapping_;  // null on meta
  std::unique_ptr<ExecutionContext> context_;
  std::vector<View> retired_;
};

}  // namespace shoal
