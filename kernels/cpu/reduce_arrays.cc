#include "kernels/reduce_arrays.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/contract.h"

namespace shoal::kernels::cpu {
namespace {

// A block stays in the first-level cache while the sources are added one after another.
constexpr int64_t kBlock = 2048;

// out = a + b. Two ranks are common, and need no memory in between.
template <class T>
void AddTwo(const T* a, const T* b, T* out, int64_t n) {
  using A = Accumulator<T>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = T(static_cast<A>(a[i]) + static_cast<A>(b[i]));
}

template <class T>
void AddAll(ReduceOp op, std::span<const void* const> sources, int64_t begin, T* out, int64_t n) {
  using A = Accumulator<T>;
  A sum[kBlock];
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
  for (int64_t i = 0; i < n; ++i) out[i] = T(sum[i]);
}

template <class T>
void Reduce(ReduceOp op, std::span<const void* const> sources, std::span<void* const> outs,
            int64_t count) {
  const auto source = [&](size_t s) { return static_cast<const T*>(sources[s]); };
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = std::min(kBlock, count - begin);
    T* out = static_cast<T*>(outs[0]) + begin;
    if (sources.size() == 2 && op == ReduceOp::kSum) {
      AddTwo(source(0) + begin, source(1) + begin, out, n);
    } else {
      AddAll(op, sources, begin, out, n);
    }
    for (void* other : outs.subspan(1))
      std::memcpy(static_cast<T*>(other) + begin, out, static_cast<size_t>(n) * sizeof(T));
  }
}

}  // namespace

void ReduceArrays(DType dtype, ReduceOp op, std::span<const void* const> sources,
                  std::span<void* const> outs, int64_t count) {
  VisitFloat(dtype, "all-reduce", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Reduce<T>(op, sources, outs, count);
  });
}

void ReduceInOrder(const Stream&, ReduceOp op, const View& out, const View& x) {
  const char* name = "ReduceInOrder";
  CheckRows(name, out, x);
  std::vector<const void*> sources;
  for (int64_t p = 0; p < x.dim(0); ++p)
    sources.push_back(x.as<char>() + p * x.strides[0] * static_cast<int64_t>(SizeOf(x.dtype)));
  void* const outs[] = {out.data};
  ReduceArrays(x.dtype, op, sources, outs, out.numel());
}

}  // namespace shoal::kernels::cpu
