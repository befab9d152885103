// Kernels called from several threads at once, and from inside a parallel region: what ranks as
// threads do. And the parts of an array that ranks hold give the bits that the whole gives.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <new>
#include <thread>
#include <vector>

#include "core/base/thread_count.h"
#include "kernels/dropout.h"
#include "kernels/reduce.h"
#include "kernels/rope.h"
#include "kernels/softmax.h"

namespace shoal::kernels {
namespace {

// Blocks exactly as large as asked, so that a sanitizer sees a write past one.
class HeapScratch : public ScratchSource {
 public:
  void* AllocateScratch(size_t bytes) override { return ::operator new(bytes, kAlign); }
  void FreeScratch(void* data) override { ::operator delete(data, kAlign); }

 private:
  static constexpr std::align_val_t kAlign{64};
};

// What a rank computes: results of kernels whose threads share scratch memory.
std::vector<float> Work(int rank) {
  HeapScratch scratch;
  const Stream stream{{}, nullptr, &scratch};
  constexpr int64_t kTime = 67, kHeads = 8, kWidth = 64, kAll = kTime * kHeads * kWidth;
  std::vector<float> x(kAll), sums(kWidth);
  std::vector<int32_t> positions(kTime);
  for (int64_t i = 0; i < kAll; ++i) x[i] = static_cast<float>((i * (rank + 3)) % 1009) * 0.01f;
  for (int64_t t = 0; t < kTime; ++t) positions[t] = static_cast<int32_t>(t * (rank + 1));
  const View heads(x.data(), DType::kF32, {1, kTime, kHeads, kWidth});
  const View rows(x.data(), DType::kF32, {kTime * kHeads, kWidth});
  std::vector<BF16> narrow(kAll);
  for (int i = 0; i < 20; ++i) {
    Rope(stream, heads, heads, View(positions.data(), DType::kI32, {1, kTime}), 1e4, false);
    Softmax(stream, rows, rows);
    SumRows(stream, View(sums.data(), DType::kF32, {kWidth}), rows, i > 0);
    for (int64_t j = 0; j < kAll; ++j) narrow[j] = BF16(x[j]);
    const View n(narrow.data(), DType::kBF16, {kTime * kHeads, kWidth});
    Softmax(stream, n, n);
    for (int64_t j = 0; j < kAll; ++j) x[j] += 10 * static_cast<float>(narrow[j]);
  }
  x.insert(x.end(), sums.begin(), sums.end());
  return x;
}

TEST(Threads, RanksAsThreadsDoNotDisturbEachOther) {
  constexpr int kRanks = 4;
  std::vector<std::vector<float>> alone(kRanks), together(kRanks);
  for (int r = 0; r < kRanks; ++r) alone[r] = Work(r);
  std::vector<std::thread> threads;
  for (int r = 0; r < kRanks; ++r)
    threads.emplace_back([&, r] {
      SetKernelThreads(r % 3 + 1);
      together[r] = Work(r);
    });
  for (std::thread& t : threads) t.join();
  for (int r = 0; r < kRanks; ++r) EXPECT_EQ(alone[r], together[r]) << r;
}

TEST(Threads, KernelsRunInsideAParallelRegion) {
  constexpr int kRanks = 3;
  std::vector<std::vector<float>> alone(kRanks), together(kRanks);
  for (int r = 0; r < kRanks; ++r) alone[r] = Work(r);
#pragma omp parallel num_threads(kRanks)
  {
    const int r = omp_get_thread_num();
    together[r] = Work(r);
  }
  for (int r = 0; r < kRanks; ++r) EXPECT_EQ(alone[r], together[r]) << r;
}

TEST(Dropout, IsTheSameForAnyPartitionOfTheRows) {
  constexpr int64_t kRows = 40, kWidth = 67;  // odd: rows begin anywhere in a Philox block
  HeapScratch scratch;
  const Stream stream{{}, nullptr, &scratch};
  std::vector<float> x(kRows * kWidth, 1), whole(x), parts(x);
  std::vector<int64_t> tokens(kRows);
  for (int64_t i = 0; i < kRows; ++i) tokens[i] = 1000 + i;
  const View in(x.data(), DType::kF32, {kRows, kWidth});
  const View token(tokens.data(), DType::kI64, {kRows});
  const PhiloxKey key{7, 9};
  Dropout(stream, View(whole.data(), DType::kF32, {kRows, kWidth}), in, token, 0.25, key);
  const View out(parts.data(), DType::kF32, {kRows, kWidth});
  for (int64_t begin = 0, n = 1; begin < kRows; begin += n, n = std::min(2 * n, kRows - begin))
    Dropout(stream, out.Narrow(0, begin, n), in.Narrow(0, begin, n), token.Narrow(0, begin, n),
            0.25, key);
  EXPECT_EQ(whole, parts);
  const auto dropped = std::count(whole.begin(), whole.end(), 0.0f);
  EXPECT_NEAR(static_cast<double>(dropped) / (kRows * kWidth), 0.25, 0.04);
}

}  // namespace
}  // namespace shoal::kernels
