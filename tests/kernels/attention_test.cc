// What attention refuses.
#include "kernels/attention.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

}  // namespace
}  // namespace shoal::kernels
