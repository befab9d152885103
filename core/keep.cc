#include "core/keep.h"

#include <algorithm>
#include <string_view>

namespace shoal {
namespace {

thread_local KeepScope* current = nullptr;

}  // namespace

KeepScope::KeepScope(KeptResults* results, bool replay)
    : results_(results), replay_(replay), outer_(current), ops_{Storage::Now()} {
  current = this;
  if (results_ != nullptr && replay_ && results_->needed.empty())
    idle_.emplace(ExecutionContext::Idle());
}

KeepScope::~KeepScope() {
  current = outer_;
  if (results_ != nullptr && !replay_) results_->needed.resize(needed_);
}

void KeepScope::Recorded(const char* op, const Tensor& out, const std::vector<Tensor>& kept) {
  out.storage().Written();
  KeepScope* scope = current;
  if (scope == nullptr || scope->results_ == nullptr) return;
  scope->ops_.push_back(Storage::Now());
  if (scope->replay_)
    scope->SecondRun(op, kept);
  else
    scope->FirstRun(op, kept);
}

void KeepScope::FirstRun(const char* op, const std::vector<Tensor>& kept) {
  results_->needed.push_back(op);
  for (const Tensor& t : kept) {
    if (!t.defined()) continue;
    const auto maker = std::ranges::lower_bound(ops_, t.storage().written());
    // Also what this op made beside its result is this op's.
    const auto number = std::min<std::ptrdiff_t>(maker - ops_.begin(), std::ssize(ops_) - 1);
    needed_ = std::max(needed_, static_cast<size_t>(number));
  }
}

void KeepScope::SecondRun(const char* op, const std::vector<Tensor>& kept) {
  const std::vector<const char*>& needed = results_->needed;
  const size_t number = ops_.size() - 1;
  if (number > needed.size()) {
    for (const Tensor& t : kept)
      SHOAL_CHECK(!t.defined() || t.storage().written() <= ops_[needed.size()], "recompute",
                  "'{}' keeps a tensor now that the first forward did not keep", op);
    return;
  }
  SHOAL_CHECK(std::string_view(op) == needed[number - 1], "recompute",
              "op {} of the second forward is '{}', and was '{}'", number, op, needed[number - 1]);
  if (number == needed.size()) idle_.emplace(ExecutionContext::Idle());
}

bool TakeKept(std::initializer_list<Tensor*> results) {
  if (current == nullptr || current->results_ == nullptr || !current->replay_) return false;
  KeptResults& kept = *current->results_;
  for (Tensor* result : results) {
    SHOAL_CHECK(kept.next < kept.tensors.size(), "recompute",
                "the second forward does more than the first");
    *result = kept.tensors[kept.next++].Take();
  }
  return true;
}

void Keep(std::initializer_list<Tensor> results) {
  if (current == nullptr || current->results_ == nullptr || current->replay_) return;
  for (const Tensor& result : results) current->results_->tensors.emplace_back(result);
}

}  // namespace shoal
