// Masters in two halves go exactly where whole ones go, whatever the model sees of them.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/optimizer.h"

namespace shoal::kernels {
namespace {

TEST(SplitMaster, HoldsAnyFloat) {
  const auto nearest = [](float x) { return static_cast<float>(Split(x).nearest); };
  const auto exact = [](float x) {
    const SplitFloat s = Split(x);
    return std::bit_cast<uint32_t>(Join(s.nearest, s.rest)) == std::bit_cast<uint32_t>(x);
  };
  std::mt19937 random(1);
  for (int i = 0; i < 1000000; ++i) {
    const auto x = std::bit_cast<float>(static_cast<uint32_t>(random()));
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(nearest(x)) && std::isnan(Join(Split(x).nearest, Split(x).rest)));
      continue;
    }
    ASSERT_TRUE(exact(x)) << x;
    // As near as the nearest even one.
    const double rounded = static_cast<double>(BF16(x));
    if (std::isinf(rounded))
      ASSERT_EQ(nearest(x), rounded) << x;
    else
      ASSERT_EQ(std::abs(static_cast<double>(nearest(x)) - x), std::abs(rounded - x)) << x;
  }
  using Limits = std::numeric_limits<float>;
  for (const float x : {0.0f, -0.0f, Limits::infinity(), -Limits::infinity(), Limits::max(),
                        Limits::lowest(), Limits::denorm_min(), Limits::min()})
    EXPECT_TRUE(exact(x)) << x;
  // Ties.
  EXPECT_EQ(nearest(1 + 0x1p-8f), 1 + 0x1p-7f);
  EXPECT_EQ(nearest(-1 - 0x1p-8f), -1 - 0x1p-7f);
}

template <class Update>
void Compare(const Update& update) {
  constexpr int64_t kN = 1003;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> whole(kN), m(kN), v(kN), m2(kN), v2(kN), gradient(kN);
  std::vector<BF16> parameter(kN), nearest(kN);
  std::vector<int16_t> rest(kN);
  for (int64_t i = 0; i < kN; ++i) {
    whole[i] = normal(random);
    nearest[i] = Split(whole[i]).nearest;
    rest[i] = Split(whole[i]).rest;
  }
  const auto view = [](auto& values, DType dtype) { return View(values.data(), dtype, {kN}); };
  for (int64_t step = 1; step <= 30; ++step) {
    for (float& g : gradient) g = normal(random);
    const View g = view(gradient, DType::kF32);
    update(view(parameter, DType::kBF16), view(whole, DType::kF32), view(m, DType::kF32),
           view(v, DType::kF32), g, step);
    update(view(nearest, DType::kBF16), view(rest, DType::kI16), view(m2, DType::kF32),
           view(v2, DType::kF32), g, step);
    for (int64_t i = 0; i < kN; ++i) {
      ASSERT_EQ(Join(nearest[i], rest[i]), whole[i]) << i << ", step " << step;
      ASSERT_EQ(nearest[i].bits, Split(whole[i]).nearest.bits);
    }
    ASSERT_EQ(m, m2);
    ASSERT_EQ(v, v2);
  }
}

TEST(SplitMaster, GoesWhereTheWholeGoes) {
  Compare([](const View& p, const View& master, const View& m, const View& v, const View& g,
             int64_t step) {
    AdamW({}, p, master, m, v, g, {.lr = 0.01, .weight_decay = 0.1, .step = step});
  });
  Compare([](const View& p, const View& master, const View& m, const View&, const View& g,
             int64_t step) {
    Sgd({}, p, master, m, g, {.lr = 0.01, .momentum = 0.9, .first = step == 1});
  });
}

}  // namespace
}  // namespace shoal::kernels
