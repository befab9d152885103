// Results that a forward which will be run again keeps, so that the second run need not compute
// them: of ops whose recomputation costs more than their bytes are worth.
#pragma once

#include <vector>

#include "core/saved_tensor.h"

namespace shoal {

// What one forward has kept, in the order in which its ops did.
struct KeptResults {
  std::vector<SavedTensor> tensors;
  size_t next = 0;
};

// While in scope, this thread's ops put results into `results` or, if `replay`, take them out.
class KeepScope {
 public:
  KeepScope(KeptResults* results, bool replay);
  ~KeepScope();
  KeepScope(const KeepScope&) = delete;
  KeepScope& operator=(const KeepScope&) = delete;

 private:
  KeptResults* previous_;
  bool previous_replay_;
};

// For ops: true if the results of an earlier run are there; they are taken.
bool TakeKept(std::initializer_list<Tensor*> results);
// Keeps them if somebody wants them.
void Keep(std::initializer_list<Tensor> results);

}  // namespace shoal
