// Every case of every kernel on the emulated device, and the emulation itself: a barrier that is
// missing must not go unnoticed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda_runtime.h"
#include "kernels/cuda_runtime.h"
#include "kernels/embedding.h"
#include "kernels/linear_cross_entropy.h"
#include "kernels/norm.h"
#include "kernels/random.h"
#include "tests/cuda_emulation/emulated_gemm.h"
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

// Products that cuBLASLt does not do, or does without the bias, come out the same.
TEST(LongEmulatedMatmul, WithoutTheLibrary) {
  cuda_emulation::library = cuda_emulation::Library::kAbsent;
  CheckOnEmulatedDevice("Matmul", 1000000);
  cuda_emulation::library = cuda_emulation::Library::kWhole;
}
TEST(EmulatedMatmul, WithoutTheLibrary) {
  cuda_emulation::library = cuda_emulation::Library::kAbsent;
  CheckOnEmulatedDevice("Matmul", 60);
  cuda_emulation::library = cuda_emulation::Library::kWithoutEpilogue;
  CheckOnEmulatedDevice("Matmul", 60);
  cuda_emulation::library = cuda_emulation::Library::kWhole;
}

class HeapScratch : public ScratchSource {
 public:
  void* AllocateScratch(size_t bytes) override { return aligned_alloc(64, (bytes + 63) / 64 * 64); }
  void FreeScratch(void* data) override { free(data); }
};

// Host memory is the emulated device's.
class EmulatedDevice : public ::testing::Test {
 protected:
  EmulatedDevice() { cuda_.scratch = cpu_.scratch = &scratch_; }
  template <class T>
  static View Of(std::vector<T>& values, Dims shape) {
    return {values.data(), DTypeOf<T>::value, shape};
  }
  // The message of the error that the device found.
  std::string Fault() {
    try {
      shoal::cuda::Synchronize(cuda_.handle);
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::kData);
      return e.what();
    }
    return "";
  }

  HeapScratch scratch_;
  Stream cuda_{{DeviceType::kCuda}}, cpu_;
};

TEST_F(EmulatedDevice, AnIdOutsideTheTableIsNaNAndAnErrorOnce) {
  std::vector<float> table(15, 2), out(6, 0), dtable(15, 0), dout(6, 1);
  for (int32_t bad : {5, -1, 1 << 30}) {
    std::vector<int32_t> ids = {4, bad};
    Embedding(cuda_, Of(out, {2, 3}), Of(table, {5, 3}), Of(ids, {2}));
    EXPECT_EQ(Fault(),
              fmt::format("[Embedding] token 1 has id {}, but the vocabulary is [0, 5)", bad));
    EXPECT_EQ(Fault(), "");
    for (int i = 0; i < 6; ++i) EXPECT_EQ(out[i] == 2, i < 3) << i;
    for (int i = 3; i < 6; ++i) EXPECT_TRUE(std::isnan(out[i]));
    EmbeddingBackward(cuda_, Of(dtable, {5, 3}), false, Of(dout, {2, 3}), Of(ids, {2}));
    EXPECT_EQ(
        Fault(),
        fmt::format("[EmbeddingBackward] token 1 has id {}, but the vocabulary is [0, 5)", bad));
    for (int i = 0; i < 15; ++i) EXPECT_EQ(dtable[i], i < 12 ? 0 : 1) << i;
  }
}

TEST_F(EmulatedDevice, ALabelOutsideTheVocabularyIsNaNAndAnError) {
  std::vector<float> x(6, 0.5), w(15, 0.25), losses(2), dx(6), dw(15);
  std::vector<int32_t> labels = {4, 5};
  LinearCrossEntropy(cuda_, Of(losses, {2}), Of(dx, {2, 3}), Of(dw, {5, 3}), false, Of(x, {2, 3}),
                     Of(w, {5, 3}), Of(labels, {2}), {.chunk_tokens = 1});
  EXPECT_THAT(Fault(), ::testing::HasSubstr("row 1 has label 5, but the vocabulary has 5 entries"));
  EXPECT_EQ(Fault(), "");
  EXPECT_NEAR(losses[0], std::log(5.0), 1e-6);
  EXPECT_TRUE(std::isnan(losses[1]));
  for (int i = 3; i < 6; ++i) EXPECT_EQ(dx[i], 0) << i;
}

TEST_F(EmulatedDevice, RandomFillsAreTheCpusBits) {
  const PhiloxKey key = {42, HashName("w")};
  std::vector<double> a(7 * 13), b(7 * 13);
  std::vector<BF16> c(7 * 13), d(7 * 13);
  for (int64_t column : {0, 1, 6}) {
    FillNormal(cuda_, Of(a, {7, 13}), 0.02, 3, column, 19, key);
    FillNormal(cpu_, Of(b, {7, 13}), 0.02, 3, column, 19, key);
    EXPECT_EQ(a, b);
    FillUniform(cuda_, Of(a, {7, 13}), 0.5, 3, column, 19, key);
    FillUniform(cpu_, Of(b, {7, 13}), 0.5, 3, column, 19, key);
    EXPECT_EQ(a, b);
    FillNormal(cuda_, Of(c, {7, 13}), 0.02, 3, column, 19, key);
    FillNormal(cpu_, Of(d, {7, 13}), 0.02, 3, column, 19, key);
    EXPECT_EQ(std::memcmp(c.data(), d.data(), c.size() * sizeof(BF16)), 0);
  }
}

// Rows so long that the shares of dweight do not fit shared memory.
TEST_F(EmulatedDevice, LayerNormOfLongRows) {
  const int64_t rows = 3, columns = 12501;
  std::vector<double> x(rows * columns), dy(x), weight(columns), bias(columns, 0.5), out(x), dx(x);
  std::vector<double> mean(rows), rstd(rows), dweight(columns), dbias(columns);
  FillNormal(cpu_, Of(x, {rows, columns}), 1, 0, 0, columns, {1, 1});
  FillNormal(cpu_, Of(dy, {rows, columns}), 1, 0, 0, columns, {1, 2});
  FillNormal(cpu_, Of(weight, {1, columns}), 1, 0, 0, columns, {1, 3});
  auto out2 = out, mean2 = mean, rstd2 = rstd, dx2 = dx, dweight2 = dweight, dbias2 = dbias;
  const auto run = [&](const Stream& stream, auto& o, auto& m, auto& r, auto& gx, auto& gw,
                       auto& gb) {
    LayerNorm(stream, Of(o, {rows, columns}), Of(m, {rows}), Of(r, {rows}), Of(x, {rows, columns}),
              Of(weight, {columns}), Of(bias, {columns}), 1e-5);
    LayerNormBackward(stream, Of(gx, {rows, columns}), false, Of(gw, {columns}), Of(gb, {columns}),
                      false, Of(dy, {rows, columns}), Of(x, {rows, columns}), Of(weight, {columns}),
                      Of(m, {rows}), Of(r, {rows}));
  };
  run(cuda_, out, mean, rstd, dx, dweight, dbias);
  run(cpu_, out2, mean2, rstd2, dx2, dweight2, dbias2);
  EXPECT_THAT(out, ::testing::Pointwise(::testing::DoubleNear(1e-11), out2));
  EXPECT_THAT(dx, ::testing::Pointwise(::testing::DoubleNear(1e-11), dx2));
  EXPECT_THAT(dweight, ::testing::Pointwise(::testing::DoubleNear(1e-11), dweight2));
  EXPECT_THAT(dbias, ::testing::Pointwise(::testing::DoubleNear(1e-11), dbias2));
}

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
