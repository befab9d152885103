// Every differentiable op against finite differences.
#include "core/ops.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/core/gradient_check.h"

namespace shoal {
namespace {

using testing::CheckGradients;
using testing::RandomTensor;
using Inputs = std::vector<Tensor>;

TEST(Ops, Add) {
  CheckGradients([](const Inputs& x) { return ops::Add(x[0], x[1]); },
                 {RandomTensor({3, 5}, 1), RandomTensor({3, 5}, 2)});
}

TEST(Ops, AddOfOneTensorToItself) {
  CheckGradients([](const Inputs& x) { return ops::Add(x[0], x[0]); }, {RandomTensor({7}, 1)});
}

TEST(Ops, Multiply) {
  CheckGradients([](const Inputs& x) { return ops::Multiply(x[0], x[1]); },
                 {RandomTensor({3, 5}, 1), RandomTensor({3, 5}, 2)});
}

TEST(Ops, Scale) {
  CheckGradients([](const Inputs& x) { return ops::Scale(x[0], -2.5); }, {RandomTensor({3, 5}, 1)});
}

TEST(Ops, Gelu) {
  CheckGradients([](const Inputs& x) { return ops::Gelu(x[0]); }, {RandomTensor({4, 9}, 1, -4, 4)});
}

TEST(Ops, Silu) {
  CheckGradients([](const Inputs& x) { return ops::Silu(x[0]); }, {RandomTensor({4, 9}, 1, -4, 4)});
}

TEST(Ops, SwiGlu) {
  CheckGradients([](const Inputs& x) { return ops::SwiGlu(x[0], x[1]); },
                 {RandomTensor({4, 9}, 1, -4, 4), RandomTensor({4, 9}, 2)});
}

TEST(Ops, ReshapeAndNarrow) {
  CheckGradients(
      [](const Inputs& x) {
        const Tensor r = ops::Reshape(x[0], {6, -1});
        return ops::Add(ops::Scale(ops::Narrow(r, 0, 1, 3), 2),
                        ops::Scale(ops::Narrow(r, 0, 3, 3), 3));
      },
      {RandomTensor({3, 10}, 1)});
}

TEST(Ops, NarrowOfTheLastDimension) {
  const auto f = [](const Inputs& x) { return ops::Narrow(ops::Scale(x[0], 2), 1, 1, 2); };
  CheckGradients(f, {RandomTensor({3, 4}, 1)});
}

TEST(Ops, Sum) {
  CheckGradients([](const Inputs& x) { return ops::Sum(ops::Multiply(x[0], x[0])); },
                 {RandomTensor({5, 3}, 1)});
}

TEST(Ops, Linear) {
  CheckGradients([](const Inputs& x) { return ops::Linear(x[0], x[1], x[2]); },
                 {RandomTensor({2, 3, 5}, 1), RandomTensor({7, 5}, 2), RandomTensor({7}, 3)});
}

TEST(Ops, LinearWithoutBias) {
  CheckGradients([](const Inputs& x) { return ops::Linear(x[0], x[1]); },
                 {RandomTensor({1, 5}, 1), RandomTensor({1, 5}, 2)});
}

class MatmulTest : public ::testing::TestWithParam<std::tuple<bool, bool, bool>> {};

TEST_P(MatmulTest, Gradient) {
  const auto [batched, ta, tb] = GetParam();
  Dims a = ta ? Dims{5, 3} : Dims{3, 5}, b = tb ? Dims{4, 5} : Dims{5, 4};
  if (batched) {
    a = Dims{2, a[0], a[1]};
    b = Dims{2, b[0], b[1]};
  }
  CheckGradients([ta = ta, tb = tb](const Inputs& x) { return ops::Matmul(x[0], x[1], ta, tb); },
                 {RandomTensor(a, 1), RandomTensor(b, 2)});
}

INSTANTIATE_TEST_SUITE_P(Layouts, MatmulTest,
                         ::testing::Combine(::testing::Bool(), ::testing::Bool(),
                                            ::testing::Bool()));

TEST(Ops, RmsNorm) {
  CheckGradients([](const Inputs& x) { return ops::RmsNorm(x[0], x[1], 1e-5); },
                 {RandomTensor({2, 3, 8}, 1), RandomTensor({8}, 2)});
}

TEST(Ops, LayerNorm) {
  CheckGradients([](const Inputs& x) { return ops::LayerNorm(x[0], x[1], x[2], 1e-5); },
                 {RandomTensor({5, 8}, 1), RandomTensor({8}, 2), RandomTensor({8}, 3)});
}

TEST(Ops, Softmax) {
  CheckGradients([](const Inputs& x) { return ops::Softmax(x[0]); },
                 {RandomTensor({3, 7}, 1, -3, 3)});
}

TEST(Ops, Rope) {
  const Tensor positions = Tensor::From(std::vector<int32_t>{0, 1, 2, 5, 6, 1000}, {2, 3});
  CheckGradients([&](const Inputs& x) { return ops::Rope(x[0], positions, 10000); },
                 {RandomTensor({2, 3, 2, 6}, 1)});
}

TEST(Ops, AttentionWithGroupedHeads) {
  kernels::AttentionOptions options;
  options.scale = 0.7;
  CheckGradients(
      [&](const Inputs& x) { return ops::Attention(x[0], x[1], x[2], {}, {}, options).out; },
      {RandomTensor({2, 5, 4, 6}, 1), RandomTensor({2, 5, 2, 6}, 2),
       RandomTensor({2, 5, 2, 6}, 3)});
}

TEST(Ops, AttentionWithinDocuments) {
  kernels::AttentionOptions options;
  options.scale = 0.7;
  const Tensor documents = Tensor::From(std::vector<int32_t>{0, 0, 1, 1, 1, 2}, {1, 6});
  CheckGradients(
      [&](const Inputs& x) {
        return ops::Attention(x[0], x[1], x[2], documents, documents, options).out;
      },
      {RandomTensor({1, 6, 2, 4}, 1), RandomTensor({1, 6, 2, 4}, 2),
       RandomTensor({1, 6, 2, 4}, 3)});
}

TEST(Ops, AttentionWithDropout) {
  kernels::AttentionOptions options;
  options.scale = 0.7;
  options.dropout = {.p = 0.4, .key = {1, 2}};
  const Tensor starts = Tensor::From(std::vector<int64_t>{3, 100}, {2});
  CheckGradients(
      [&](const Inputs& x) {
        return ops::Attention(x[0], x[1], x[2], {}, {}, options, starts).out;
      },
      {RandomTensor({2, 9, 4, 6}, 1), RandomTensor({2, 9, 2, 6}, 2),
       RandomTensor({2, 9, 2, 6}, 3)});
}

// Scores are equal and values are unit vectors: the output is the mask.
TEST(Ops, AttentionDropsIndependently) {
  constexpr int64_t kBatch = 2, kHeads = 4, kTokens = 64;
  const Dims shape{kBatch, kTokens, kHeads, kTokens};
  const Tensor zeros = Tensor::Full(shape, DType::kF32, 0);
  const Tensor units = Tensor::Full(shape, DType::kF32, 0);
  for (int64_t i = 0; i < shape.numel(); ++i)
    if (i % kTokens == i / (kHeads * kTokens) % kTokens) units.data<float>()[i] = 1;
  const Tensor starts = Tensor::From(std::vector<int64_t>{1000, 1000 + kTokens}, {kBatch});
  for (const double p : {0.1, 0.5, 0.9}) {
    kernels::AttentionOptions options = {.causal = false};
    options.dropout = {.p = p, .key = {3, 4}};
    const std::vector<double> out =
        ops::Attention(zeros, zeros, units, {}, {}, options, starts).out.ToVector();
    // [batch, query, head, key]: 1 less its mean where it stays.
    std::vector<double> kept(out.size());
    double mean = 0, variance = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      const double factor = out[i] * kTokens;
      ASSERT_TRUE(factor == 0 || std::abs(factor - 1 / (1 - p)) < 1e-3) << factor;
      kept[i] = (factor > 0 ? 1 : 0) - (1 - p);
      mean += kept[i];
      variance += kept[i] * kept[i];
    }
    const auto n = static_cast<double>(out.size());
    const double sigma = std::sqrt(p * (1 - p));
    EXPECT_LT(std::abs(mean / n), 4 * sigma / std::sqrt(n)) << p;
    EXPECT_NEAR(variance / n, p * (1 - p), 0.02) << p;
    // Of neighbouring keys, of keys of other draws, of heads, of queries, of sequences.
    for (const int64_t apart : {int64_t{1}, int64_t{2}, int64_t{8}, kTokens, kHeads * kTokens,
                                kTokens * kHeads * kTokens}) {
      double product = 0;
      int64_t pairs = 0;
      for (size_t i = 0; i + apart < kept.size(); ++i, ++pairs)
        product += kept[i] * kept[i + apart];
      EXPECT_LT(std::abs(product) / pairs, 4 * sigma * sigma / std::sqrt(pairs))
          << p << " " << apart;
    }
  }
}

TEST(Ops, Embedding) {
  const Tensor ids = Tensor::From(std::vector<int32_t>{3, 0, 3, 1}, {2, 2});
  CheckGradients([&](const Inputs& x) { return ops::Embedding(x[0], ids); },
                 {RandomTensor({5, 4}, 1)});
}

TEST(Ops, Dropout) {
  const Tensor tokens = Tensor::From(std::vector<int64_t>{7, 8, 9}, {3});
  CheckGradients(
      [&](const Inputs& x) {
        return ops::Dropout(x[0], tokens, 0.4, {1, 2});
      },
      {RandomTensor({3, 8}, 1)});
}

TEST(Ops, LinearCrossEntropy) {
  const Tensor labels = Tensor::From(std::vector<int32_t>{3, -1, 0, 10, 4, 4}, {2, 3});
  CheckGradients([&](const Inputs& x) { return ops::LinearCrossEntropy(x[0], x[1], labels, 5); },
                 {RandomTensor({2, 3, 4}, 1), RandomTensor({11, 4}, 2, -2, 2)});
}

TEST(Ops, LinearCrossEntropyScalesByTheUpstreamGradient) {
  const Tensor labels = Tensor::From(std::vector<int32_t>{3, 1}, {2});
  CheckGradients(
      [&](const Inputs& x) {
        return ops::Scale(ops::LinearCrossEntropy(x[0], x[1], labels, 2), -3);
      },
      {RandomTensor({2, 4}, 1), RandomTensor({5, 4}, 2)});
}

// One tensor used by several consumers, as a residual stream is.
TEST(Ops, SharedInputsAddTheirGradients) {
  CheckGradients(
      [](const Inputs& x) {
        const Tensor h = ops::Scale(x[0], 1.5);
        const Tensor n = ops::RmsNorm(h, x[1], 1e-5);
        const Tensor q = ops::Linear(n, x[2]), k = ops::Linear(n, x[2]);
        return ops::Add(h, ops::Multiply(q, k));
      },
      {RandomTensor({3, 4}, 1), RandomTensor({4}, 2), RandomTensor({4, 4}, 3)});
}

TEST(Ops, CastAddsInTheLeafsDtype) {
  const testing::Variable x(RandomTensor({4}, 1).To(DType::kF32));
  Backward(ops::Sum(ops::Cast(ops::Cast(x.Use(), DType::kBF16), DType::kF64)));
  EXPECT_EQ(x.leaf->grad.dtype(), DType::kF32);
  EXPECT_EQ(x.leaf->grad.ToVector(), std::vector<double>(4, 1.0));
}

TEST(Ops, MismatchedOperandsAreAnError) {
  EXPECT_THROW(ops::Add(RandomTensor({3}, 1), RandomTensor({4}, 1)), Error);
  EXPECT_THROW(ops::Linear(RandomTensor({3}, 1), RandomTensor({4, 4}, 1)), Error);
  EXPECT_THROW(ops::Matmul(RandomTensor({3, 2}, 1), RandomTensor({3, 2}, 1)), Error);
}

}  // namespace
}  // namespace shoal
