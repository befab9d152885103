// How CPU kernels share work between threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "core/base/thread_count.h"
#include "core/base/view.h"

namespace shoal::kernels::cpu {

// Below this many elements waking the threads costs more than they save.
constexpr int64_t kForkElements = 32 * 1024;

// An output from this size on is written past the caches: nothing of it would still be there when
// it is read, and the lines need not be fetched before they are overwritten.
constexpr size_t kStreamBytes = 16 << 20;

// Whether `out` is to be written past the caches. Not in place, where its lines are there already.
// Rows of `row_bytes` must leave every row's start aligned for that.
inline bool WritesPastCaches(const View& out, std::initializer_list<const View*> inputs,
                             size_t row_bytes = 64) {
  for (const View* in : inputs)
    if (in->data == out.data) return false;
  return out.bytes() >= kStreamBytes && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
}

// Calls f(slot, begin, end) on disjoint ranges that cover [0, n), from one thread or from all
// (libgomp starts threads anew when the size of a team changes). `elements` is the work of all n
// items. Which range an item falls into depends on the threads, so what f computes for it must not.
// Calls with one slot, below KernelThreads(), do not overlap in time. f must not throw.
template <class F>
void ParallelSlots(int64_t n, int64_t elements, F f) {
  const int threads = elements < kForkElements || n < 2 ? 1 : KernelThreads();
  if (threads == 1) {
    if (n > 0) f(0, int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t begin = n * t / count, end = n * (t + 1) / count;
    if (begin < end) f(static_cast<int>(t), begin, end);
  }
}
template <class F>
void ParallelFor(int64_t n, int64_t elements, F f) {
  ParallelSlots(n, elements, [&](int, int64_t begin, int64_t end) { f(begin, end); });
}

// Calls f(block, begin, end) for blocks of fixed size, shared between threads: for sums whose
// partial results are added up block by block afterwards.
template <class F>
void ParallelBlocks(int64_t n, int64_t block, int64_t elements, F f) {
  ParallelFor((n + block - 1) / block, elements, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) f(b, b * block, std::min(n, (b + 1) * block));
  });
}

// The size of blocks of rows for column sums over `rows`: a function of the shape alone, with few
// enough blocks that their partial sums stay small.
inline int64_t RowsPerBlock(int64_t rows) { return std::max<int64_t>(16, (rows + 63) / 64); }

// Ranges of a flat array: multiples of a cache line's worth of the smallest element, so that no two
// threads write one line.
template <class F>
void ParallelFlat(int64_t n, F f) {
  constexpr int64_t kUnit = 64;
  ParallelFor((n + kUnit - 1) / kUnit, n,
              [&](int64_t first, int64_t last) { f(first * kUnit, std::min(n, last * kUnit)); });
}

}  // namespace shoal::kernels::cpu
