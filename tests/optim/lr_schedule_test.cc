#include "optim/lr_schedule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace shoal {
namespace {

TEST(LrSchedule, WarmsUpLinearlyToThePeak) {
  for (const char* name : {"cosine", "linear", "wsd", "constant"}) {
    const LrSchedule s = {.name = name, .lr = 2, .warmup_steps = 4, .steps = 10};
    EXPECT_DOUBLE_EQ(s.At(1), 0.5) << name;
    EXPECT_DOUBLE_EQ(s.At(4), 2) << name;
  }
}

TEST(LrSchedule, EndsAtItsFloor) {
  for (const char* name : {"cosine", "linear", "wsd"}) {
    const LrSchedule s = {
        .name = name, .lr = 2, .min_fraction = 0.1, .warmup_steps = 3, .steps = 100};
    EXPECT_DOUBLE_EQ(s.At(100), 0.2) << name;
    for (int64_t step = 4; step <= 100; ++step)
      EXPECT_LE(s.At(step), s.At(step - 1) + 1e-15) << name << " " << step;
  }
}

TEST(LrSchedule, Midpoints) {
  const LrSchedule cosine = {.name = "cosine", .lr = 1, .min_fraction = 0, .steps = 100};
  EXPECT_NEAR(cosine.At(50), 0.5, 1e-15);
  EXPECT_NEAR(cosine.At(25), 0.5 * (1 + std::sqrt(0.5)), 1e-15);
  const LrSchedule linear = {.name = "linear", .lr = 1, .min_fraction = 0, .steps = 100};
  EXPECT_DOUBLE_EQ(linear.At(25), 0.75);
}

TEST(LrSchedule, WsdIsFlatUntilItsDecay) {
  const LrSchedule s = {.name = "wsd",
                        .lr = 1,
                        .min_fraction = 0,
                        .decay_fraction = 0.2,
                        .warmup_steps = 10,
                        .steps = 100};
  EXPECT_DOUBLE_EQ(s.At(11), 1);
  EXPECT_DOUBLE_EQ(s.At(80), 1);
  EXPECT_DOUBLE_EQ(s.At(90), 0.5);
}

TEST(LrSchedule, WarmupMayBeLongerThanTheRun) {
  const LrSchedule s = {.name = "cosine", .lr = 1, .warmup_steps = 10, .steps = 5};
  EXPECT_DOUBLE_EQ(s.At(5), 0.5);
}

TEST(LrSchedule, OneStep) {
  const LrSchedule s = {.name = "cosine", .lr = 1, .min_fraction = 0.1, .steps = 1};
  EXPECT_DOUBLE_EQ(s.At(1), 0.1);
}

}  // namespace
}  // namespace shoal
