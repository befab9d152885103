// The harness finds what it is there to find: each broken kernel here must be reported.
#include "tests/kernels/harness.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/base/thread_count.h"

namespace shoal::kernels::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr Device kCpu;

// out = 2 x, out [4, 3] cut out of rows of 5.
Case Doubling(std::function<void(const Stream&, float* out, float* x)> kernel) {
  return {
      .name = "Double/harness",
      .args = {Out(DType::kF32, {4, 3}).Strided(PaddedStrides({4, 3}, 2)), In(DType::kF32, {4, 3})},
      .kernel =
          [kernel](const Stream& s, const Views& a) {
            for (int i = 0; i < 12; ++i)
              a[0].as<float>()[i / 3 * 5 + i % 3] = 2 * a[1].as<float>()[i];
            kernel(s, a[0].as<float>(), a[1].as<float>());
          },
      .reference =
          [](Arrays& a) {
            for (int64_t i = 0; i < 12; ++i) a[0][i] = 2 * a[1][i];
          }};
}

TEST(Harness, AcceptsARightKernel) {
  EXPECT_THAT(Check(Doubling([](const Stream&, float*, float*) {}), kCpu), IsEmpty());
}

TEST(Harness, FindsAWrongElement) {
  const auto wrong = [](const Stream&, float* out, float*) { out[6] *= 1.0001f; };
  EXPECT_THAT(Check(Doubling(wrong), kCpu), ElementsAre(HasSubstr("1 of 12 elements differ")));
}

TEST(Harness, FindsAnElementThatIsNotWritten) {
  const auto wrong = [](const Stream&, float* out, float*) {
    out[0] = std::numeric_limits<float>::quiet_NaN();
  };
  EXPECT_THAT(Check(Doubling(wrong), kCpu), ElementsAre(HasSubstr("worst at 0: got nan")));
}

TEST(Harness, FindsWritesBeforeBetweenAndAfterTheElements) {
  for (int at : {-1, 3, 18, 30}) {
    const auto wrong = [at](const Stream&, float* out, float*) { out[at] = 0; };
    EXPECT_THAT(Check(Doubling(wrong), kCpu), ElementsAre(HasSubstr("argument 0 that are not")));
  }
}

TEST(Harness, FindsAChangedInput) {
  const auto wrong = [](const Stream&, float*, float* x) { x[5] = 0; };
  EXPECT_THAT(Check(Doubling(wrong), kCpu), ElementsAre(HasSubstr("changes bytes of argument 1")));
}

TEST(Harness, FindsDependenceOnThreads) {
  const auto wrong = [](const Stream&, float* out, float*) {
    if (KernelThreads() == 2) out[0] = std::nextafter(out[0], 2.0f);
  };
  EXPECT_THAT(Check(Doubling(wrong), kCpu), ElementsAre(HasSubstr("2 threads give other bits")));
}

TEST(Harness, FindsDependenceOnAlignment) {
  const auto wrong = [](const Stream&, float* out, float* x) {
    if (reinterpret_cast<uintptr_t>(x) % 64) out[0] = std::nextafter(out[0], 2.0f);
  };
  EXPECT_THAT(Check(Doubling(wrong), kCpu), ElementsAre(HasSubstr("another alignment")));
}

TEST(Harness, FindsMisusedScratch) {
  const auto past_its_end = [](const Stream& s, float*, float*) {
    Scratch scratch(s, 40);
    scratch.as<float>()[10] = 1;
  };
  EXPECT_THAT(Check(Doubling(past_its_end), kCpu), ElementsAre(HasSubstr("outside its scratch")));
  const auto kept = [](const Stream& s, float*, float*) { s.scratch->AllocateScratch(8); };
  EXPECT_THAT(Check(Doubling(kept), kCpu), ElementsAre(HasSubstr("not freed")));
}

Case Square(double factor) {  // dx = dy 2 x, into dx
  const auto objective = [](const Arrays& a) {
    double sum = 0;
    for (int64_t i = 0; i < a[1].numel(); ++i) sum += a[1][i] * a[2][i] * a[2][i];
    return sum;
  };
  return {.name = "Square/harness",
          .args = {InOut(DType::kF64, {7}), In(DType::kF64, {7}), In(DType::kF64, {7})},
          .kernel =
              [factor](const Stream&, const Views& a) {
                for (int i = 0; i < 7; ++i)
                  a[0].as<double>()[i] += factor * a[1].as<double>()[i] * a[2].as<double>()[i];
              },
          .reference =
              [factor](Arrays& a) {
                for (int64_t i = 0; i < 7; ++i) a[0][i] += factor * a[1][i] * a[2][i];
              },
          .gradient = {objective, {{0, 2}}}};
}

TEST(Harness, ChecksGradients) {
  EXPECT_THAT(Check(Square(2), kCpu), IsEmpty());
  EXPECT_THAT(Check(Square(2.001), kCpu), ElementsAre(HasSubstr("gradient in argument 2")));
}

TEST(Harness, RestoresTheNumberOfThreads) {
  const int before = KernelThreads();
  Check(Square(2), kCpu);
  EXPECT_EQ(KernelThreads(), before);
}

TEST(Harness, Strides) {
  EXPECT_EQ(PaddedStrides({4, 3}, 2), (Dims{5, 1}));
  EXPECT_EQ(PaddedStrides({2, 4, 3}, 1, 1), (Dims{15, 3, 1}));
  EXPECT_EQ(TransposedStrides({2, 4, 3}), (Dims{12, 1, 4}));
}

}  // namespace
}  // namespace shoal::kernels::testing
