// The shape of a strided copy, reduced to as few dimensions and as wide elements as it allows.
// Host code without CUDA, so that tests reach it.
#pragma once

#include <cstdint>

#include "core/base/view.h"

namespace shoal::kernels::cuda {

struct StridedPlan {
  static constexpr int kMaxRank = Dims::kMaxRank;
  int rank = 0;
  int64_t count = 1;  // elements
  int64_t shape[kMaxRank] = {};
  int64_t out[kMaxRank] = {}, in[kMaxRank] = {};  // strides, in elements
  bool Dense() const {
    return rank == 0 || (rank == 1 && (count <= 1 || (out[0] == 1 && in[0] == 1)));
  }
};

// Drops dimensions of size 1 and joins those that both sides walk as one.
inline StridedPlan PlanStrided(const View& out, const View& in) {
  StridedPlan plan;
  plan.count = out.numel();
  if (plan.count == 0) return plan;
  for (int i = 0; i < out.rank(); ++i) {
    if (out.shape[i] == 1) continue;
    const int last = plan.rank - 1;
    if (last >= 0 && plan.out[last] == out.strides[i] * out.shape[i] &&
        plan.in[last] == in.strides[i] * out.shape[i]) {
      plan.shape[last] *= out.shape[i];
      plan.out[last] = out.strides[i];
      plan.in[last] = in.strides[i];
    } else {
      plan.shape[plan.rank] = out.shape[i];
      plan.out[plan.rank] = out.strides[i];
      plan.in[plan.rank] = in.strides[i];
      ++plan.rank;
    }
  }
  return plan;
}

// Turns a copy of elements of `size` bytes into one of wider elements, up to 16 bytes, where the
// innermost dimension is contiguous on both sides and everything stays aligned. Returns the size.
inline int WidenStrided(StridedPlan& plan, int size, uintptr_t out, uintptr_t in) {
  if (plan.rank == 0) return size;
  const int last = plan.rank - 1;
  if (plan.out[last] != 1 || plan.in[last] != 1) return size;
  int wide = 16;
  const auto fits = [&] {
    if (out % wide || in % wide || plan.shape[last] * size % wide) return false;
    for (int i = 0; i < last; ++i)
      if (plan.out[i] * size % wide || plan.in[i] * size % wide) return false;
    return true;
  };
  while (wide > size && !fits()) wide /= 2;
  const int ratio = wide / size;
  plan.count /= ratio;
  plan.shape[last] /= ratio;
  for (int i = 0; i < last; ++i) {
    plan.out[i] /= ratio;
    plan.in[i] /= ratio;
  }
  return wide;
}

}  // namespace shoal::kernels::cuda
