// Activations that are kept in fewer bits: how many bytes they take, and what it does to gradients.
#include <gtest/gtest.h>

#include "core/context.h"
#include "kernels/quantize.h"
#include "tests/launch/parity.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: all of parity.h

// Bytes of a row of n values.
int64_t RowBytes(ActivationFormat format, DType dtype, int64_t n) {
  switch (format) {
    case ActivationFormat::kOwn:
      return n * static_cast<int64_t>(SizeOf(dtype));
    case ActivationFormat::kBF16:
      return 2 * n;
    case ActivationFormat::kInt8:
      return n + 4 * kernels::QuantizeBlocks(n);
  }
  return 0;
}

// The block's input, norm, q, k, v, attention once for it and for its projection, residual, norm,
// and the MLP's; statistics stay f32.
TEST(CompressedActivations, WhatIsKept) {
  const int64_t tokens = kSequences * 16;
  for (const char* model : {"llama", "gpt2"}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const auto format : {ActivationFormat::kBF16, ActivationFormat::kInt8}) {
        Recipe recipe = {.model = model, .dtype = dtype, .length = 16, .steps = 1};
        recipe.compress = format;
        const ModelConfig c = Model(recipe);
        const auto peak = [&](int layers) {
          recipe.layers = layers;
          return TrainOn(recipe, 1, 1).peak(MemoryClass::kActivations);
        };
        const int64_t block = (peak(7) - peak(4)) / (3 * tokens);
        const auto row = [&](int64_t n) { return RowBytes(format, dtype, n); };
        const bool llama = recipe.model == "llama";
        const int64_t norms = llama ? 2 * 4 : 4 * 4, lse = 4 * c.heads;
        const int64_t heads = (2 * c.heads + 2 * c.kv_heads) * row(c.head_dim);
        EXPECT_EQ(block, 4 * row(c.d_model) + heads + (llama ? 3 : 2) * row(c.mlp) + norms + lse)
            << model << ' ' << Name(dtype) << ' ' << static_cast<int>(format);
      }
    }
  }
}

// The first loss is exact; the first gradient is off by no more than the rounding's share.
TEST(CompressedActivations, ChangeGradientsLittle) {
  for (const char* model : {"llama", "gpt2"}) {
    Recipe recipe = {.model = model, .optimizer = "sgd", .lr = 0.1, .length = 16, .steps = 1};
    Recipe still = recipe;
    still.lr = 0;
    const Outcome start = TrainOn(still, 1, 1).outcome;
    const Outcome exact = TrainOn(recipe, 1, 1).outcome;
    // In the 2-norm over all parameters, of the update.
    const auto error = [&](ActivationFormat format) {
      recipe.compress = format;
      const Outcome rounded = TrainOn(recipe, 1, 1).outcome;
      EXPECT_EQ(rounded.losses, exact.losses);
      double off = 0, all = 0;
      for (size_t i = 0; i < exact.parameters.size(); ++i) {
        for (size_t j = 0; j < exact.parameters[i].size(); ++j) {
          off += std::pow(rounded.parameters[i][j] - exact.parameters[i][j], 2);
          all += std::pow(exact.parameters[i][j] - start.parameters[i][j], 2);
        }
      }
      return std::sqrt(off / all);
    };
    const double bf16 = error(ActivationFormat::kBF16), int8 = error(ActivationFormat::kInt8);
    RecordProperty(std::string(model) + "_bf16", std::to_string(bf16));
    RecordProperty(std::string(model) + "_int8", std::to_string(int8));
    std::printf("%s: gradient off by %.2e (bf16), %.2e (int8)\n", model, bf16, int8);
    EXPECT_GT(bf16, 1e-6) << "nothing was rounded";
    EXPECT_LT(bf16, 0x1p-9);
    EXPECT_GT(int8, bf16);
    EXPECT_LT(int8, 1.0 / 127);
  }
}

// Layouts that keep rows whole round alike, whatever else is done with what is kept.
TEST(CompressedActivations, SameNumbersOverLayouts) {
  for (const auto format : {ActivationFormat::kBF16, ActivationFormat::kInt8}) {
    Recipe recipe = {.model = "llama", .length = 16, .steps = 3, .gqa = true, .dropout = 0.1};
    recipe.compress = format;
    const auto same = [&](int ranks, int64_t micro_batches) {
      Compare(recipe, OneRank(recipe), TrainOn(recipe, ranks, micro_batches).outcome, 1e-10, 1e-10);
    };
    same(3, 2);
    recipe.zero_stage = 3;
    recipe.cp = 2;
    same(4, 1);
    recipe.cp = 1;
    recipe.pp = 2;
    for (const char* schedule : {"1f1b", "zb_h1"}) {
      recipe.schedule = schedule;
      for (const int way : {0, 1, 2}) {
        recipe.recompute = way == 1;
        recipe.selective = way == 2;
        same(4, 3);
      }
    }
  }
}

// In a file lies what is left.
TEST(CompressedActivations, InAFile) {
  Recipe recipe = {.model = "llama", .dtype = DType::kF32, .length = 64, .steps = 2};
  recipe.compress = ActivationFormat::kInt8;
  const Measured here = TrainOn(recipe, 1, 1);
  recipe.activations_dir = ::testing::TempDir();
  const Measured there = TrainOn(recipe, 1, 1);
  EXPECT_TRUE(here.outcome.parameters == there.outcome.parameters);
  EXPECT_LT(there.peak(MemoryClass::kActivations), here.peak(MemoryClass::kActivations));
}

}  // namespace
}  // namespace shoal
