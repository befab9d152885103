#include "core/keep.h"

#include <gtest/gtest.h>

#include "core/autograd.h"
#include "core/ops.h"
#include "tests/core/gradient_check.h"

namespace shoal {
namespace {

using namespace testing;  // NOLINT: of gradient_check.h

std::vector<bool> idle;  // after each op

Tensor Noted(Tensor result) {
  idle.push_back(ExecutionContext::Current().idle());
  return result;
}

// Whatever backward reads is computed again, and what comes behind the last of it is not.
TEST(Keep, TheSecondRunEndsWhereBackwardReadsNothing) {
  const Variable w(RandomTensor({4}, 1)), x(RandomTensor({4}, 2));
  const auto forward = [&](const Tensor& in) {
    const Tensor a = Noted(ops::Scale(in, 2));          // kept by the product
    const Tensor b = Noted(ops::Multiply(a, w.Use()));  // kept by Gelu
    const Tensor c = Noted(ops::Gelu(b));               // by nobody
    const Tensor d = Noted(ops::Scale(c, 3));           // by nobody
    return Noted(ops::Add(d, in));
  };
  KeptResults kept;
  Tensor out;
  {
    const NoGrad no_grad;
    const KeepScope scope(&kept, false);
    out = forward(x.value);
  }
  EXPECT_EQ(idle, std::vector<bool>(5, false));
  EXPECT_EQ(kept.needed.size(), 2);
  idle.clear();
  ExecutionContext context(Device{});
  const ContextScope here(context);
  Tensor again;
  {
    const KeepScope scope(&kept, true);
    again = forward(x.Use());
  }
  EXPECT_FALSE(ExecutionContext::Current().idle());
  EXPECT_EQ(idle, (std::vector<bool>{false, true, true, true, true}));
  // Two results lie in memory.
  EXPECT_EQ(context.allocator()->stats().peak_total, 2 * 32);
  Backward(again, Tensor::Full({4}, DType::kF64, 1));
  const std::vector<double> got = x.leaf->grad.ToVector(), of_w = w.leaf->grad.ToVector();
  x.leaf->grad = w.leaf->grad = Tensor();
  Backward(forward(x.Use()), Tensor::Full({4}, DType::kF64, 1));
  EXPECT_EQ(got, x.leaf->grad.ToVector());
  EXPECT_EQ(of_w, w.leaf->grad.ToVector());
}

TEST(Keep, WhereNothingIsReadNothingIsRunAgain) {
  const Variable x(RandomTensor({4}, 2));
  KeptResults kept;
  const auto forward = [&](const Tensor& in) { return ops::Scale(ops::Scale(in, 2), 3); };
  {
    const NoGrad no_grad;
    const KeepScope scope(&kept, false);
    forward(x.value);
  }
  EXPECT_TRUE(kept.needed.empty());
  Tensor again;
  {
    const KeepScope scope(&kept, true);
    EXPECT_TRUE(ExecutionContext::Current().idle());
    again = forward(x.Use());
  }
  Backward(again, Tensor::Full({4}, DType::kF64, 1));
  EXPECT_EQ(x.leaf->grad.ToVector(), std::vector<double>(4, 6));
}

// A forward within an op is the op's affair.
TEST(Keep, AnOpsOwnForwardCountsAsOne) {
  const Variable x(RandomTensor({4}, 2));
  KeptResults kept;
  const NoGrad no_grad;
  {
    const KeepScope scope(&kept, false);
    const Tensor a = ops::Scale(x.value, 2);
    {
      const KeepScope inner(nullptr, false);
      ops::Gelu(ops::Gelu(a));
    }
    ops::Scale(a, 2);
  }
  EXPECT_TRUE(kept.needed.empty());
}

TEST(Keep, ASecondForwardThatDiffersIsFound) {
  const Variable x(RandomTensor({4}, 2));
  KeptResults kept;
  {
    const NoGrad no_grad;
    const KeepScope scope(&kept, false);
    ops::Scale(ops::Gelu(ops::Scale(x.value, 2)), 3);
  }
  const KeepScope scope(&kept, true);
  EXPECT_THROW(ops::Gelu(x.Use()), Error);
  // And one that keeps what it did not make: Gelu's input, made after the end.
  KeptResults fewer;
  {
    const NoGrad no_grad;
    const KeepScope first(&fewer, false);
    ops::Scale(ops::Scale(x.value, 2), 3);
  }
  const KeepScope second(&fewer, true);
  const Tensor scaled = ops::Scale(x.Use(), 2);
  EXPECT_THROW(ops::Gelu(scaled), Error);
}

}  // namespace
}  // namespace shoal
