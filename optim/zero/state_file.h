// Optimizer states in a file that is mapped into memory: the host's memory holds the bucket that is
// being updated, the one that is read ahead and the one that is written behind, and the system may
// drop any page in between. The file has no name, so a killed process leaves nothing.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/base/view.h"
#include "core/context.h"

namespace shoal {

class StateFile {
 public:
  // In the folder `dir`. Error(kStorage) if no file can be made there.
  explicit StateFile(const std::string& dir);
  ~StateFile();
  StateFile(const StateFile&) = delete;
  StateFile& operator=(const StateFile&) = delete;

  // Tensors that are made while it is current lie in the file. Its space is taken at once:
  // Error(kStorage) with the numbers if there is not enough. On `meta` they are only counted.
  ExecutionContext& context() { return *context_; }

  // `states` are read or updated next: begins to read them.
  void Prefetch(std::span<const View> states) const;
  // `states` have been updated: begins to write them, and lets the last ones that were retired go
  // from memory.
  void Retire(std::span<const View> states);
  // All that was retired leaves memory.
  void Settle();

 private:
  class Mapping;
  std::shared_ptr<Mapping> mapping_;  // null on meta
  std::unique_ptr<ExecutionContext> context_;
  std::vector<View> retired_;
};

}  // namespace shoal
