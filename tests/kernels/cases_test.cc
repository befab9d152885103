// Every case of every kernel, on every device that is there.
#include <gtest/gtest.h>

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

TEST_P(KernelCases, Cpu) { CheckAll(GetParam(), {DeviceType::kCpu}); }
TEST_P(KernelCases, Cuda) { CheckAll(GetParam(), {DeviceType::kCuda}); }

// Evaluated after all case files have registered themselves.
INSTANTIATE_TEST_SUITE_P(, KernelCases, ::testing::ValuesIn(KernelNames()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace shoal::kernels::testing
