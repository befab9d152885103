// What a kernel refuses: every violation of a contract is an error that names kernel and values.
// tests/cuda_emulation builds this file too, with SHOAL_TEST_DEVICE.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <vector>

#include "core/base/build_config.h"
#include "kernels/copy.h"
#include "kernels/cuda_runtime.h"
#include "kernels/dropout.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/norm.h"
#include "kernels/optimizer.h"
#include "kernels/reduce.h"
#include "kernels/rope.h"
#include "kernels/softmax.h"

namespace shoal::kernels {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

#ifndef SHOAL_TEST_DEVICE
#define SHOAL_TEST_DEVICE kCpu
#endif
constexpr DeviceType kDevice = DeviceType::SHOAL_TEST_DEVICE;

class HeapScratch : public ScratchSource {
 public:
  void* AllocateScratch(size_t bytes) override {
    return std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  }
  void FreeScratch(void* data) override { std::free(data); }
};

class KernelContract : public ::testing::Test {
 protected:
  KernelContract() {
    stream_.device.type = kDevice;
    stream_.scratch = &scratch_;
  }
  // Views of one zeroed array that is larger than any of them.
  View F(Dims shape, DType dtype = DType::kF32) { return {data_.data(), dtype, shape}; }

  template <class Call>
  void Refuses(Call call, const char* op, const char* words, ErrorKind kind = ErrorKind::kBug) {
    try {
      call();
      if constexpr (kHaveCuda && kDevice == DeviceType::kCuda)
        shoal::cuda::Synchronize(stream_.handle);
      ADD_FAILURE() << op << " accepts what should fail with: " << words;
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), kind);
      EXPECT_EQ(e.op(), op);
      EXPECT_THAT(e.message(), HasSubstr(words));
    }
  }

  HeapScratch scratch_;
  Stream stream_;
  std::vector<double> data_ = std::vector<double>(4096);
};

TEST_F(KernelContract, Shapes) {
  Refuses([&] { Copy(stream_, F({3, 4}), F({4, 3})); }, "Copy", "[4, 3], not [3, 4]");
  Refuses([&] { Add(stream_, F({3}), F({4}), F({3}), 1, 1); }, "Add", "[4], not [3]");
  Refuses([&] { AddBias(stream_, F({3, 4}), F({3, 4}), F({3})); }, "AddBias", "[3], not [4]");
  Refuses([&] { AddBias(stream_, F({4}), F({4}), F({4})); }, "AddBias", "not 2 dimensions");
  Refuses([&] { SwiGlu(stream_, F({3}), F({3}), F({1, 3})); }, "SwiGlu", "[1, 3], not [3]");
  Refuses([&] { SumRows(stream_, F({3}), F({3, 4}), false); }, "SumRows", "[3], not [4]");
  Refuses([&] { Sum(stream_, F({2}, DType::kF64), F({3})); }, "Sum", "[2], not [1]");
  Refuses(
      [&] {
        RmsNorm(stream_, F({3, 4}), F({4}), F({3, 4}), F({4}), 0);
      },
      "RmsNorm", "rstd has shape [4], not [3]");
  Refuses([&] { RmsNorm(stream_, F({3, 0}), F({3}), F({3, 0}), F({0}), 0); }, "RmsNorm", "empty");
  Refuses([&] { Softmax(stream_, F({3}), F({3})); }, "Softmax", "not 2 dimensions");
  Refuses(
      [&] {
        Dropout(stream_, F({3, 4}), F({3, 4}), F({4}, DType::kI64), 0.1, {});
      },
      "Dropout", "[4], not [3]");
  Refuses(
      [&] {
        Rope(stream_, F({1, 2, 1, 3}), F({1, 2, 1, 3}), F({1, 2}, DType::kI32), 1e4, 0);
      },
      "Rope", "head dimension 3 is odd");
  Refuses(
      [&] {
        Embedding(stream_, F({2, 4}), F({5, 3}), F({2}, DType::kI32));
      },
      "Embedding", "[2, 4], not [2, 3]");
  Refuses([&] { AdamW(stream_, F({3}), {}, F({3}), F({4}), F({3}), {}); }, "AdamW", "[4], not [3]");
}

TEST_F(KernelContract, DTypes) {
  const View bf16 = F({3}, DType::kBF16), i32 = F({3}, DType::kI32), f16 = F({3}, DType::kF16);
  Refuses([&] { Gelu(stream_, F({3}), bf16); }, "Gelu", "is bf16, not f32");
  Refuses([&] { Gelu(stream_, i32, i32); }, "elementwise", "not i32");
  Refuses([&] { Add(stream_, F({3}), f16, F({3}), 1, 1); }, "Add", "not f16");
  Refuses([&] { Sum(stream_, F({1}), F({3})); }, "Sum", "out is f32, not f64");
  Refuses([&] { Embedding(stream_, F({3, 4}), F({5, 4}), F({3})); }, "Embedding", "ids is f32");
  Refuses(
      [&] {
        LayerNorm(stream_, F({3, 4}, DType::kBF16), F({3}, DType::kBF16), F({3}),
                  F({3, 4}, DType::kBF16), F({4}, DType::kBF16), F({4}, DType::kBF16), 0);
      },
      "LayerNorm", "mean is bf16, not f32");
  Refuses([&] { AdamW(stream_, bf16, {}, F({3}), F({3}), bf16, {}); }, "AdamW",
          "needs a master copy");
  Refuses(
      [&] { AdamW(stream_, bf16, F({3}, DType::kI16), F({3}), F({3}), F({3}, DType::kF64), {}); },
      "AdamW", "a split master takes gradients");
  Refuses([&] { AdamW(stream_, F({3}), F({3}), F({3}), F({3}), bf16, {}); }, "AdamW",
          "has no use for a master copy");
  Refuses([&] { AdamW(stream_, bf16, F({3}), bf16, F({3}), bf16, {}); }, "AdamW", "m is bf16");
}

TEST_F(KernelContract, Strides) {
  const View transposed = F({3, 4}).Transposed();
  Refuses([&] { Scale(stream_, F({4, 3}), transposed, 2); }, "Scale", "must be contiguous");
  Refuses([&] { Softmax(stream_, transposed, F({4, 3})); }, "Softmax", "must be contiguous");
  View x = F({1, 2, 1, 4});
  x.strides[3] = 2;
  Refuses(
      [&] {
        Rope(stream_, F({1, 2, 1, 4}), x, F({1, 2}, DType::kI32), 1e4, false);
      },
      "Rope", "last strides 2 of x");
}

TEST_F(KernelContract, Values) {
  for (double p : {-0.1, 1.0, std::nan("")})
    Refuses(
        [&] {
          Dropout(stream_, F({3, 4}), F({3, 4}), F({3}, DType::kI64), p, {});
        },
        "Dropout", "not in [0, 1)");
  Refuses([&] { AdamW(stream_, F({3}), {}, F({3}), F({3}), F({3}), {.step = 0}); }, "AdamW",
          "step is 0");
  Refuses([&] { Sgd(stream_, F({3}), {}, {}, F({3}), {.momentum = 0.9}); }, "Sgd",
          "its buffer is absent");
  std::vector<int32_t> ids{1, 5};
  const View id(ids.data(), DType::kI32, {2});
  for (int32_t bad : {5, -1}) {
    ids[1] = bad;
    const auto words = fmt::format("token 1 has id {}, but the vocabulary is [0, 5)", bad);
    Refuses(
        [&] {
          Embedding(stream_, F({2, 3}), F({5, 3}), id);
        },
        "Embedding", words.c_str(), ErrorKind::kData);
    Refuses(
        [&] {
          EmbeddingBackward(stream_, F({5, 3}), false, F({2, 3}), id);
        },
        "EmbeddingBackward", words.c_str(), ErrorKind::kData);
  }
}

TEST_F(KernelContract, MetaTouchesNothing) {
  Stream meta{{DeviceType::kMeta}};
  const View nowhere(nullptr, DType::kF32, {1 << 30, 1 << 10}, {DeviceType::kMeta});
  Copy(meta, nowhere, nowhere);
  Gelu(meta, nowhere, nowhere);
  Silu(meta, nowhere, nowhere);
}

}  // namespace
}  // namespace shoal::kernels
