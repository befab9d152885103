#include "core/keep.h"

namespace shoal {
namespace {
thread_local KeptResults* current = nullptr;
thread_local bool replaying = false;
}  // namespace

KeepScope::KeepScope(KeptResults* results, bool replay)
    : previous_(current), previous_replay_(replaying) {
  current = results;
  replaying = replay;
}
KeepScope::~KeepScope() {
  current = previous_;
  replaying = previous_replay_;
}

bool TakeKept(std::initializer_list<Tensor*> results) {
  if (current == nullptr || !replaying) return false;
  for (Tensor* result : results) {
    SHOAL_CHECK(current->next < current->tensors.size(), "recompute",
                "the second forward does more than the first");
    *result = current->tensors[current->next++].Take();
  }
  return true;
}

void Keep(std::initializer_list<Tensor> results) {
  if (current == nullptr || replaying) return;
  for (const Tensor& result : results) current->tensors.emplace_back(result);
}

}  // namespace shoal
