// Every case of every kernel, on every device that is there.
#include <gtest/gtest.h>

#include "hwy/targets.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

using KernelCases = ::testing::TestWithParam<std::string>;

void CheckAll(const std::string& kernel, Device device) {
  if (std::string why = WhyUnavailable(device); !why.empty()) GTEST_SKIP() << why;
  for (const Case& c : AllCases()) {
    if (!c.test || c.name.substr(0, c.name.find('/')) != kernel) continue;
    for (const std::string& problem : Check(c, device)) ADD_FAILURE() << c.name << ": " << problem;
  }
}

// Runs what follows in its scope with the vectors of AVX2.
class NarrowVectors {
 public:
  NarrowVectors() { Choose(~int64_t{HWY_AVX2}); }
  ~NarrowVectors() { Choose(0); }

 private:
  void Choose(int64_t disabled) {
    hwy::DisableTargets(disabled);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

TEST_P(KernelCases, Cpu) { CheckAll(GetParam(), {DeviceType::kCpu}); }
#ifdef __x86_64__
TEST_P(KernelCases, CpuAvx2) {
  if (!(hwy::SupportedTargets() & HWY_AVX3)) GTEST_SKIP() << "Cpu already ran with AVX2";
  const NarrowVectors narrow;
  CheckAll(GetParam(), {DeviceType::kCpu});
}

TEST(SumOrder, DoesNotDependOnTheVectorWidth) {
  for (const Case& c : AllCases()) {
    if (!c.test || !(c.name.starts_with("Sum/") || c.name.starts_with("SumSquares/"))) continue;
    PreparedCase wide(c, {}, false), narrow(c, {}, false);
    wide.Run();
    const NarrowVectors vectors;
    narrow.Run();
    EXPECT_EQ(wide.OutputBytes(), narrow.OutputBytes()) << c.name;
  }
}
#endif
TEST_P(KernelCases, Cuda) { CheckAll(GetParam(), {DeviceType::kCuda}); }

// Evaluated after all case files have registered themselves.
INSTANTIATE_TEST_SUITE_P(, KernelCases, ::testing::ValuesIn(KernelNames()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace shoal::kernels::testing
