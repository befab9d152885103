// Attention on each instruction set that it is compiled for and this machine has.
#include <gtest/gtest.h>

#include "hwy/targets.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

bool IsForTargets(const std::string& name) {
  if (name.rfind("Attention", 0) != 0) return false;
  for (const char* part : {"/97x97", "/200x420", "/head_dim", "/heads", "/window5/", "/documents/",
                           "/packed", "/huge_logits", "/nan_"})
    if (name.find(part) != std::string::npos) return true;
  return false;
}

TEST(AttentionTargets, Agree) {
  const int64_t all = hwy::SupportedTargets();
  int tried = 0;
  for (int64_t target : {int64_t{HWY_AVX2}, int64_t{HWY_AVX3}}) {
    if (!(all & target)) continue;
    ++tried;
    hwy::SetSupportedTargetsForTest(target);
    for (const Case& c : AllCases())
      if (c.test && IsForTargets(c.name))
        for (const std::string& problem : Check(c, {DeviceType::kCpu}))
          ADD_FAILURE() << c.name << " on " << hwy::TargetName(target) << ": " << problem;
  }
  hwy::SetSupportedTargetsForTest(0);
  if (tried == 0) GTEST_SKIP() << "neither AVX2 nor AVX-512 here";
}

}  // namespace
}  // namespace shoal::kernels::testing
