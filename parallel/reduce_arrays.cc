#include "parallel/reduce_arrays.h"

#include <algorithm>

namespace shoal {
namespace {

// A block stays in the first-level cache while the sources are added one after another.
constexpr int64_t kBlock = 2048;

template <class T>
void Reduce(ReduceOp op, std::span<const void* const> sources, T* out, int64_t count) {
  using A = Accumulator<T>;
  A sum[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = std::min(kBlock, count - begin);
    const T* first = static_cast<const T*>(sources[0]) + begin;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] = static_cast<A>(first[i]);
    for (const void* source : sources.subspan(1)) {
      const T* values = static_cast<const T*>(source) + begin;
      if (op == ReduceOp::kSum) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<A>(values[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          const A value = static_cast<A>(values[i]);
          // A NaN of any rank is seen by all.
          sum[i] = sum[i] >= value || sum[i] != sum[i] ? sum[i] : value;
        }
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[begin + i] = T(sum[i]);
  }
}

}  // namespace

void ReduceArrays(DType dtype, ReduceOp op, std::span<const void* const> sources, void* out,
                  int64_t count) {
  VisitFloat(dtype, "all-reduce", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Reduce<T>(op, sources, static_cast<T*>(out), count);
  });
}

}  // namespace shoal
