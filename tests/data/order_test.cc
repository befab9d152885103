#include "data/order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <vector>

#include "core/base/error.h"

namespace shoal {
namespace {

std::vector<int64_t> Epoch(uint64_t seed, int64_t epoch, int64_t n) {
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = ShuffledIndex(seed, epoch, n, i);
  return order;
}

TEST(Order, IsAPermutationOfEverySize) {
  std::vector<int64_t> sizes(300);
  std::iota(sizes.begin(), sizes.end(), 1);
  for (const int64_t n :
       {509, 511, 512, 513, 997, 1000, 4095, 4096, 4097, 65535, 65536, 65537, 100003})
    sizes.push_back(n);
  for (const int64_t n : sizes) {
    std::vector<bool> seen(n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t index = ShuffledIndex(7, 3, n, i);
      ASSERT_GE(index, 0);
      ASSERT_LT(index, n);
      ASSERT_FALSE(seen[index]) << index << " twice in " << n;
      seen[index] = true;
    }
  }
}

TEST(Order, DiffersBySeedAndEpoch) {
  const int64_t n = 1000;
  std::set<std::vector<int64_t>> orders;
  for (uint64_t seed : {0ull, 1ull, 2ull, ~0ull})
    for (int64_t epoch : {0, 1, 2, 1000000}) orders.insert(Epoch(seed, epoch, n));
  EXPECT_EQ(orders.size(), 16u);
  // Two random permutations agree in one place on average.
  const auto a = Epoch(1, 0, n), b = Epoch(1, 1, n);
  int same = 0;
  for (int64_t i = 0; i < n; ++i) same += a[i] == b[i];
  EXPECT_LT(same, 10);
}

// The numbers are part of every run's identity: a change here breaks the resumption of old runs.
TEST(Order, IsFixedForAllTime) {
  EXPECT_EQ(Epoch(42, 0, 10), (std::vector<int64_t>{9, 3, 6, 5, 2, 4, 8, 1, 0, 7}));
  EXPECT_EQ(ShuffledIndex(42, 5, 1000000000000, 123456789), 988036791011);
}

// All orders of a few elements are equally likely: chi-square over seeds and epochs.
TEST(Order, SmallSizesReachAllOrdersEvenly) {
  for (const int64_t n : {2, 3, 4, 5, 6}) {
    std::map<std::vector<int64_t>, int> counts;
    const int draws = 24000;
    for (int i = 0; i < draws; ++i) ++counts[Epoch(i / 10, i % 10, n)];
    const int orders = static_cast<int>(std::tgamma(n + 1) + 0.5);
    EXPECT_EQ(static_cast<int>(counts.size()), orders) << n;
    const double expected = static_cast<double>(draws) / orders;
    double chi2 = 0;
    for (const auto& [order, count] : counts)
      chi2 += (count - expected) * (count - expected) / expected;
    const double freedom = orders - 1;
    EXPECT_LT(chi2, freedom + 5 * std::sqrt(2 * freedom)) << n;
  }
}

// Where a position goes is even over seeds, and neighbours go to unrelated places.
TEST(Order, PlacesAreEvenAndNeighboursUnrelated) {
  const int64_t n = 101;
  const int draws = 20200;
  for (const int64_t position : {0, 1, 50, 100}) {
    std::vector<int> counts(n), steps(n);
    for (int seed = 0; seed < draws; ++seed) {
      const int64_t here = ShuffledIndex(seed, 0, n, position);
      const int64_t next = ShuffledIndex(seed, 0, n, (position + 1) % n);
      ++counts[here];
      ++steps[(next - here + n) % n];
    }
    EXPECT_EQ(steps[0], 0);
    double chi2 = 0, chi2_steps = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double expected = static_cast<double>(draws) / n;
      chi2 += (counts[i] - expected) * (counts[i] - expected) / expected;
      const double expected_step = static_cast<double>(draws) / (n - 1);
      if (i) chi2_steps += (steps[i] - expected_step) * (steps[i] - expected_step) / expected_step;
    }
    EXPECT_LT(chi2, 100 + 5 * std::sqrt(200.0)) << position;
    EXPECT_LT(chi2_steps, 99 + 5 * std::sqrt(198.0)) << position;
  }
}

TEST(Order, SeeksInATrillionAtOnce) {
  const int64_t n = 1000000000000;
  const auto start = std::chrono::steady_clock::now();
  std::set<int64_t> seen;
  for (int64_t i = 0; i < 20000; ++i) {
    const int64_t index = ShuffledIndex(9, 2, n, i * 49999999);
    ASSERT_GE(index, 0);
    ASSERT_LT(index, n);
    seen.insert(index);
  }
  EXPECT_EQ(seen.size(), 20000u);
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 2.0);
  const int64_t largest = (int64_t{1} << 62) - 1;
  EXPECT_LT(ShuffledIndex(1, 0, largest, largest - 1), largest);
}

TEST(Order, RefusesPlacesOutside) {
  EXPECT_THROW(ShuffledIndex(1, 0, 0, 0), Error);
  EXPECT_THROW(ShuffledIndex(1, 0, 5, 5), Error);
  EXPECT_THROW(ShuffledIndex(1, 0, 5, -1), Error);
  EXPECT_THROW(ShuffledIndex(1, -1, 5, 0), Error);
  EXPECT_THROW(ShuffledIndex(1, 0, int64_t{1} << 62, 0), Error);
}

}  // namespace
}  // namespace shoal
