// A forward that is run again for its gradient. The first run keeps results of ops whose
// recomputation costs more than their bytes are worth, and the second need not compute them. Nor
// does it compute what no backward reads: the ops behind the last one that made something which
// is kept for backward. (A block's second forward ends before its last product and what sums that
// over ranks.)
#pragma once

#include <optional>
#include <vector>

#include "core/context.h"
#include "core/saved_tensor.h"

namespace shoal {

// Of one forward.
struct KeptResults {
  std::vector<SavedTensor> tensors;  // in the order in which its ops kept them
  size_t next = 0;
  // Names of its first ops, up to the last that makes what backward reads.
  std::vector<const char*> needed;
};

// While in scope, this thread's ops put results into `results` or, if `replay`, take them out. With
// null they do neither: for a forward inside an op, which is one op to the scope around it.
class KeepScope {
 public:
  KeepScope(KeptResults* results, bool replay);
  ~KeepScope();
  KeepScope(const KeepScope&) = delete;
  KeepScope& operator=(const KeepScope&) = delete;

  // By Record: an op has made `out` and keeps `kept` for its backward.
  static void Recorded(const char* op, const Tensor& out, const std::vector<Tensor>& kept);

 private:
  friend bool TakeKept(std::initializer_list<Tensor*> results);
  friend void Keep(std::initializer_list<Tensor> results);

  void FirstRun(const char* op, const std::vector<Tensor>& kept);
  void SecondRun(const char* op, const std::vector<Tensor>& kept);

  KeptResults* results_;
  bool replay_;
  KeepScope* outer_;
  std::vector<uint64_t> ops_;  // when each was recorded (Storage::Now), from the scope's begin
  size_t needed_ = 0;          // of them, on the first run
  // After the last op that is needed: nothing is computed, sent or counted.
  std::optional<ContextScope> idle_;
};

// For ops: true if the results of an earlier run are there; they are taken.
bool TakeKept(std::initializer_list<Tensor*> results);
// Keeps them if somebody wants them.
void Keep(std::initializer_list<Tensor> results);

}  // namespace shoal
