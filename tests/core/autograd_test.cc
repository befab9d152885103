#include "core/autograd.h"

#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>

#include "core/ops.h"
#include "tests/core/gradient_check.h"

namespace shoal {
namespace {

using testing::RandomTensor;
using testing::Variable;

TEST(Autograd, AccumulatesOverBackwards) {
  const Variable x(Tensor::From(std::vector<double>{2}, {1}));
  for (int i = 0; i < 3; ++i) Backward(ops::Multiply(x.Use(), x.Use()));
  EXPECT_DOUBLE_EQ(x.leaf->grad.Item(), 12);
}

TEST(Autograd, HooksSeeEveryShareAndTheLastAsFinal) {
  const Variable x(Tensor::From(std::vector<double>{2}, {1}));
  std::string seen;
  x.leaf->hooks.push_back([&](GradEvent e) { seen += e == GradEvent::kFinal ? "F" : "s"; });
  x.leaf->hooks.push_back([&](GradEvent e) { seen += e == GradEvent::kFinal ? "f" : "S"; });
  BackwardOptions more;
  more.final_micro_batch = false;
  Backward(ops::Add(x.Use(), ops::Scale(x.Use(), 2)), {}, more);
  EXPECT_EQ(seen, "sS");  // once, though x is used twice
  Backward(ops::Scale(x.Use(), 2));
  EXPECT_EQ(seen, "sSsSFf");
  EXPECT_DOUBLE_EQ(x.leaf->grad.Item(), 5);
}

TEST(Autograd, NoGradRecordsNothing) {
  const Variable x(Tensor::From(std::vector<double>{2}, {1}));
  const NoGrad no_grad;
  EXPECT_EQ(ops::Scale(x.Use(), 2).node(), nullptr);
}

TEST(Autograd, AGraphIsUsedOnce) {
  const Variable x(Tensor::From(std::vector<double>{2}, {1}));
  const Tensor y = ops::Scale(x.Use(), 2);
  Backward(y);
  EXPECT_THROW(Backward(y), Error);
  EXPECT_THROW(Backward(x.value), Error);  // depends on nothing
}

TEST(Autograd, DeepGraphsNeitherRunNorDieByRecursion) {
  const Variable x(Tensor::From(std::vector<double>{1}, {1}));
  Tensor y = x.Use();
  for (int i = 0; i < 200000; ++i) y = ops::Scale(y, 1);
  Tensor dropped = x.Use();
  for (int i = 0; i < 200000; ++i) dropped = ops::Scale(dropped, 1);
  Backward(y);
  EXPECT_DOUBLE_EQ(x.leaf->grad.Item(), 1);
}

// The halves of a split backward together are the whole, and the first half leaves weights alone.
TEST(Autograd, SplitBackwardEqualsWhole) {
  const auto build = [](const std::vector<Variable>& v) {
    const Tensor ids = Tensor::From(std::vector<int32_t>{1, 0, 1}, {3});
    const Tensor x = ops::Add(v[0].Use(), ops::Embedding(v[4].Use(), ids));
    const Tensor h = ops::Linear(ops::RmsNorm(x, v[1].Use(), 1e-5), v[2].Use(), v[3].Use());
    return ops::Linear(ops::SwiGlu(h, ops::Scale(h, 0.5)), v[2].Use());
  };
  const auto variables = [] {
    return std::vector<Variable>{Variable(RandomTensor({3, 4}, 1)), Variable(RandomTensor({4}, 2)),
                                 Variable(RandomTensor({4, 4}, 3)), Variable(RandomTensor({4}, 4)),
                                 Variable(RandomTensor({2, 4}, 5))};
  };
  const Tensor weights = RandomTensor({3, 4}, 9);
  const std::vector<Variable> whole = variables(), split = variables();
  Backward(build(whole), weights);

  // v[0] enters as an activation: its gradient belongs to the first half.
  split[0].leaf->weight = false;
  DeferredGradients deferred;
  int fired = 0;
  // Of a gain, whose gradient comes with that of its input, too.
  for (const size_t i : {1, 2}) split[i].leaf->hooks.push_back([&](GradEvent) { ++fired; });
  BackwardOptions options;
  options.deferred = &deferred;
  Backward(build(split), weights, options);
  EXPECT_EQ(split[0].leaf->grad.ToVector(), whole[0].leaf->grad.ToVector());
  EXPECT_FALSE(split[2].leaf->grad.defined());
  EXPECT_EQ(fired, 0);
  EXPECT_FALSE(deferred.empty());
  deferred.Run();
  EXPECT_EQ(fired, 4);  // a share, and final
  for (size_t i = 0; i < whole.size(); ++i) {
    EXPECT_EQ(whole[i].leaf->grad.ToVector(), split[i].leaf->grad.ToVector()) << i;
  }
}

TEST(Autograd, SavedTensorHooksReplaceWhatIsKept) {
  int packed = 0, unpacked = 0;
  const Variable x(RandomTensor({4}, 1)), w(RandomTensor({4}, 2));
  Tensor y;
  {
    const SavedTensorScope scope({[&](const Tensor& t) -> std::any {
                                    ++packed;
                                    return t.Clone();
                                  },
                                  [&](const std::any& kept) {
                                    ++unpacked;
                                    return std::any_cast<Tensor>(kept);
                                  }});
    y = ops::Multiply(ops::Scale(x.Use(), 2), w.Use());
  }
  // The parameter w is not an activation: only Scale's result was packed.
  EXPECT_EQ(packed, 1);
  Backward(ops::Sum(y));
  EXPECT_EQ(unpacked, 1);
  const std::vector<double> wv = w.value.ToVector(), g = x.leaf->grad.ToVector();
  for (size_t i = 0; i < g.size(); ++i) EXPECT_DOUBLE_EQ(g[i], 2 * wv[i]);
}

TEST(Autograd, ActivationsAreFreedAsBackwardGoes) {
  ExecutionContext context(Device{});
  const ContextScope scope(context);
  const Variable x(RandomTensor({1000}, 1));
  const auto live = [&] {
    return context.allocator()->stats().live[static_cast<int>(MemoryClass::kActivations)];
  };
  const int64_t before = live();
  {
    Tensor y = x.Use();
    for (int i = 0; i < 10; ++i) y = ops::Gelu(y);
    EXPECT_EQ(live() - before, 10 * 8000);
    Backward(y, Tensor::Full({1000}, DType::kF64, 1));
  }
  EXPECT_EQ(live(), before);
}

// After an error in the middle, other graphs over the same parameters work as if nothing had been.
TEST(Autograd, AnErrorInTheMiddleLeavesNothingWaiting) {
  const Variable x(Tensor::From(std::vector<double>{2}, {1}));
  const Variable w(Tensor::From(std::vector<double>{3}, {1}));
  int fired = 0;
  x.leaf->hooks.push_back([&](GradEvent e) { fired += e == GradEvent::kFinal; });
  w.leaf->hooks.push_back([&](GradEvent e) { fired += e == GradEvent::kFinal; });
  const auto check = [&] {
    x.leaf->grad = w.leaf->grad = Tensor();
    fired = 0;
    Backward(ops::Multiply(ops::Add(x.Use(), x.Use()), w.Use()));
    EXPECT_EQ(fired, 2);
    EXPECT_DOUBLE_EQ(x.leaf->grad.Item(), 6);
    EXPECT_DOUBLE_EQ(w.leaf->grad.Item(), 4);
  };
  check();
  const auto failing = [](const Tensor& t) {
    return Record("failing", t.Clone(), {t}, {},
                  [](GradContext&) { SHOAL_FAIL(ErrorKind::kBug, "failing", "on purpose"); });
  };
  const auto wrong_shape = [](const Tensor& t) {
    return Record("wrong_shape", t.Clone(), {t}, {},
                  [](GradContext& c) { c.Give(0, Tensor::Full({7}, DType::kF64, 1)); });
  };
  using Op = std::function<Tensor(const Tensor&)>;
  for (const Op& op : {Op(failing), Op(wrong_shape)}) {
    for (int depth = 0; depth < 3; ++depth) {
      Tensor y = ops::Multiply(op(x.Use()), w.Use());
      y = ops::Add(y, ops::Multiply(x.Use(), w.Use()));
      for (int i = 0; i < depth; ++i) y = ops::Add(y, op(y));
      EXPECT_THROW(Backward(y), Error);
      check();
      DeferredGradients later;
      BackwardOptions split;
      split.deferred = &later;
      y = ops::Multiply(op(ops::Scale(x.Use(), 2)), w.Use());
      EXPECT_THROW(Backward(y, {}, split), Error);
      check();
    }
  }
  // Refused before it began: the graph is partly used up, the gradient does not fit.
  const Tensor used = ops::Scale(x.Use(), 2);
  Backward(used);
  EXPECT_THROW(Backward(ops::Multiply(ops::Add(used, w.Use()), x.Use())), Error);
  check();
  EXPECT_THROW(Backward(ops::Scale(x.Use(), 2), Tensor::Full({3}, DType::kF64, 1)), Error);
  check();
  // A parameter's hook fails.
  x.leaf->hooks.insert(x.leaf->hooks.begin(), [](GradEvent) { throw std::runtime_error("hook"); });
  EXPECT_THROW(Backward(ops::Multiply(x.Use(), ops::Scale(w.Use(), 2))), std::runtime_error);
  x.leaf->hooks.erase(x.leaf->hooks.begin());
  check();
}

TEST(Autograd, DeferredGradientsThatFailAreNotRunAgain) {
  const Variable x(Tensor::From(std::vector<double>{2}, {1}));
  DeferredGradients later;
  BackwardOptions split;
  split.deferred = &later;
  Backward(ops::Multiply(x.Use(), x.Use()), {}, split);
  ASSERT_FALSE(later.empty());
  x.leaf->hooks.push_back([](GradEvent) { throw std::runtime_error("hook"); });
  EXPECT_THROW(later.Run(), std::runtime_error);
  EXPECT_TRUE(later.empty());
  later.Run();
}

}  // namespace
}  // namespace shoal
