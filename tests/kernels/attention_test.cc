// What attention refuses, and what its dropout drops.
#include "kernels/attention.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace shoal::kernels {
namespace {

// The message of the error that a call with these arguments ends in.
class AttentionContract : public ::testing::Test {
 protected:
  AttentionContract() {
    for (View* v : {&out_, &q_}) *v = View(data_.data(), DType::kF32, {2, 5, 4, 8});
    for (View* v : {&k_, &v_}) *v = View(data_.data(), DType::kF32, {2, 7, 2, 8});
    lse_ = View(data_.data(), DType::kF32, {2, 4, 5});
  }
  std::string Message() {
    try {
      Attention({}, out_, lse_, q_, k_, v_, q_document_, k_document_, options_);
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::kBug);
      EXPECT_EQ(e.op(), "Attention");
      return e.message();
    }
    return "no error";
  }

  std::vector<float> data_ = std::vector<float>(1024);
  AttentionOptions options_;
  View out_, lse_, q_, k_, v_, q_document_, k_document_;
};

using ::testing::HasSubstr;

TEST_F(AttentionContract, Shapes) {
  k_ = v_ = View(data_.data(), DType::kF32, {2, 7, 3, 8});
  EXPECT_THAT(Message(), HasSubstr("4 heads are not a multiple of 3 kv heads"));
  k_ = v_ = View(data_.data(), DType::kF32, {2, 7, 2, 16});
  EXPECT_THAT(Message(), HasSubstr("k has shape [2, 7, 2, 16], not [2, 7, 2, 8]"));
}

TEST_F(AttentionContract, Values) {
  v_.shape[1] = 6;
  EXPECT_THAT(Message(), HasSubstr("v has shape [2, 6, 2, 8], not [2, 7, 2, 8]"));
}

TEST_F(AttentionContract, Types) {
  lse_.dtype = DType::kBF16;
  EXPECT_THAT(Message(), HasSubstr("lse is bf16, not f32"));
  q_.dtype = DType::kF16;
  EXPECT_THAT(Message(), HasSubstr("f16"));
}

TEST_F(AttentionContract, LastDimensionIsContiguous) {
  q_.strides[3] = 2;
  EXPECT_THAT(Message(), HasSubstr("q's last dimension has stride 2"));
}

TEST_F(AttentionContract, DocumentsComeTogether) {
  q_document_ = View(data_.data(), DType::kI32, {2, 5});
  EXPECT_THAT(Message(), HasSubstr("only one of q_document and k_document"));
  k_document_ = View(data_.data(), DType::kI32, {2, 5});
  EXPECT_THAT(Message(), HasSubstr("k_document has shape [2, 5], not [2, 7]"));
}

TEST_F(AttentionContract, DropoutNeedsItsNumbers) {
  options_.dropout.p = 1;
  EXPECT_THAT(Message(), HasSubstr("dropout's p is 1, not in [0, 1)"));
  options_.dropout.p = 0.5;
  options_.dropout.sequence_starts = View(data_.data(), DType::kI64, {3});
  EXPECT_THAT(Message(), HasSubstr("sequence_starts has shape [3], not [2]"));
}

// Scores are equal and values are unit vectors: the output is the mask.
TEST(AttentionDropout, DropsIndependently) {
  constexpr int64_t kBatch = 2, kHeads = 4, kTokens = 64;
  const Dims shape{kBatch, kTokens, kHeads, kTokens};
  std::vector<float> zeros(shape.numel()), units(shape.numel()), out(shape.numel()),
      lse(kBatch * kHeads * kTokens);
  for (int64_t i = 0; i < shape.numel(); ++i)
    units[i] = i % kTokens == i / (kHeads * kTokens) % kTokens ? 1 : 0;
  std::vector<int64_t> starts = {1000, 1000 + kTokens};
  const auto f32 = [](std::vector<float>& v, const Dims& dims) {
    return View(v.data(), DType::kF32, dims);
  };
  for (const double p : {0.1, 0.5, 0.9}) {
    AttentionOptions options = {.causal = false};
    options.dropout = {
        .p = p, .key = {3, 4}, .sequence_starts = View(starts.data(), DType::kI64, {2})};
    Attention({}, f32(out, shape), f32(lse, {kBatch, kHeads, kTokens}), f32(zeros, shape),
              f32(zeros, shape), f32(units, shape), {}, {}, options);
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

}  // namespace
}  // namespace shoal::kernels
