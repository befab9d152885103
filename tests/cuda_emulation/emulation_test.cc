// Every case of every kernel on the emulated device, and the emulation itself: a barrier that is
// missing must not go unnoticed.
#include <gtest/gtest.h>

#include <vector>

#include "cuda_runtime.h"
#include "tests/kernels/harness.h"

namespace shoal::kernels::testing {
namespace {

void CheckOnEmulatedDevice(const std::string& kernel, size_t most) {
  std::vector<const Case*> cases;
  for (const Case& c : AllCases())
    if (c.test && c.name.substr(0, c.name.find('/')) == kernel) cases.push_back(&c);
  for (size_t i = 0, step = cases.size() / most + 1; i < cases.size(); i += step)
    for (const std::string& problem : Check(*cases[i], {DeviceType::kCuda}))
      ADD_FAILURE() << cases[i]->name << ": " << problem;
}

using EmulatedKernels = ::testing::TestWithParam<std::string>;
TEST_P(EmulatedKernels, FollowTheDefinition) { CheckOnEmulatedDevice(GetParam(), 100); }

using LongEmulatedKernels = ::testing::TestWithParam<std::string>;
TEST_P(LongEmulatedKernels, FollowTheDefinition) { CheckOnEmulatedDevice(GetParam(), 1000000); }

std::string NameOf(const ::testing::TestParamInfo<std::string>& info) { return info.param; }
INSTANTIATE_TEST_SUITE_P(, EmulatedKernels, ::testing::ValuesIn(KernelNames()), NameOf);
INSTANTIATE_TEST_SUITE_P(, LongEmulatedKernels, ::testing::ValuesIn(KernelNames()), NameOf);

// Each thread passes its number to its neighbour through shared memory, again and again.
template <bool kBarriers>
void PassAround(int* out) {
  __shared__ int cell[256];
  const int mine = static_cast<int>(threadIdx.x), next = (mine + 1) % 256;
  int value = mine;
  for (int round = 0; round < 8; ++round) {
    cell[next] = value;
    if (kBarriers) __syncthreads();
    value = cell[mine];
    __syncthreads();
  }
  out[mine] = value;
}

bool PassesAround(void (*kernel)(int*)) {
  std::vector<int> out(256, -1);
  cuda_emulation::Run(1, 256, 0, [&] { kernel(out.data()); });
  for (int i = 0; i < 256; ++i)
    if (out[i] != (i + 256 - 8) % 256) return false;
  return true;
}

TEST(Emulation, FindsAMissingBarrier) {
  EXPECT_TRUE(PassesAround(PassAround<true>));
  EXPECT_FALSE(PassesAround(PassAround<false>));
}

TEST(Emulation, FindsABarrierThatNotAllReach) {
  EXPECT_THROW(cuda_emulation::Run(1, 64, 0,
                                   [] {
                                     if (threadIdx.x != 3) __syncwarp();
                                     __syncthreads();
                                   }),
               Error);
}

TEST(Emulation, FindsWritesBehindSharedMemory) {
  EXPECT_THROW(
      cuda_emulation::Run(1, 32, 100,
                          [] { cuda_emulation::DynamicSharedMemory()[100 + threadIdx.x] = 1; }),
      Error);
}

}  // namespace
}  // namespace shoal::kernels::testing
