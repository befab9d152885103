#include "core/module.h"

#include <gtest/gtest.h>

#include "core/init.h"
#include "core/layers.h"
#include "core/ops.h"

namespace shoal {
namespace {

constexpr InitSpec kNormal = {InitSpec::Kind::kNormal, 0.5};

class TwoLayers : public UnaryModule {
 public:
  TwoLayers() {
    AddChild("first", first_, std::make_shared<Linear>(4, 6, "embed", "mlp", true, kNormal));
    AddChild("second", second_, std::make_shared<Linear>(6, 4, "mlp", "embed", false, kNormal));
  }

 protected:
  Tensor Forward(const Tensor& x) override { return (*second_)((*first_)(x)); }

 private:
  std::shared_ptr<UnaryModule> first_, second_;
};

class Outer : public UnaryModule {
 public:
  Outer() { AddChild("inner", inner_, std::make_shared<TwoLayers>()); }

 protected:
  Tensor Forward(const Tensor& x) override { return (*inner_)(x); }

 private:
  std::shared_ptr<UnaryModule> inner_;
};

class Doubler : public UnaryModule {
 protected:
  Tensor Forward(const Tensor& x) override { return ops::Scale(x, 2); }
};

TEST(Module, NamesParametersByPath) {
  Outer outer;
  std::vector<std::string> names;
  for (const auto& p : outer.Parameters()) names.push_back(p->name());
  EXPECT_EQ(names, (std::vector<std::string>{"inner.first.weight", "inner.first.bias",
                                             "inner.second.weight"}));
}

TEST(Module, ReplaceChangesWhatIsCalled) {
  Outer outer;
  MaterializeParameters(outer, DType::kF64, 1);
  outer.Replace("inner.second", std::make_shared<Doubler>());
  EXPECT_EQ(outer(Tensor::Full({1, 4}, DType::kF64, 1)).dim(-1), 6);
  EXPECT_EQ(outer.Parameters().size(), 2u);
  EXPECT_THROW(outer.Replace("inner.third", std::make_shared<Doubler>()), Error);
  EXPECT_THROW(outer.Replace("inner.first", std::make_shared<LmLoss>()), Error);
}

TEST(Module, HooksSurroundForwardAndBackward) {
  Outer outer;
  MaterializeParameters(outer, DType::kF64, 1);
  std::string seen;
  outer.hooks().pre_forward.push_back([&](Module&) { seen += "f"; });
  outer.hooks().post_forward.push_back([&](Module&) { seen += "F"; });
  outer.hooks().pre_backward.push_back([&](Module&) { seen += "b"; });
  outer.hooks().post_backward.push_back([&](Module&) { seen += "B"; });
  Tensor x = Tensor::Full({1, 4}, DType::kF64, 1);
  const auto leaf = std::make_shared<Leaf>(x.shape(), x.dtype());
  x.set_node(leaf);
  for (const auto& p : outer.Parameters()) {
    p->leaf().hooks.push_back([&](GradEvent e) { seen += e == GradEvent::kFinal ? "" : "w"; });
  }
  Backward(ops::Sum(outer(x)));
  EXPECT_EQ(seen.substr(0, 3), "fFb");
  EXPECT_NE(seen.find('B'), std::string::npos);
  EXPECT_EQ(std::count(seen.begin(), seen.end(), 'w'), 3);
  EXPECT_TRUE(leaf->grad.defined());
}

// A slice of a parameter starts with the same numbers as that part of the whole.
TEST(Init, ValuesDependOnNameAndGlobalIndexOnly) {
  Parameter whole({8, 10}, {"mlp", "embed"}, kNormal), part({8, 10}, {"mlp", "embed"}, kNormal);
  whole.set_name("a.weight");
  part.set_name("a.weight");
  part.TakeSlice(0, 3, 4);
  part.TakeSlice(1, 5, 3);
  whole.Materialize(DType::kF32);
  part.Materialize(DType::kF32);
  InitParameter(whole, 7);
  InitParameter(part, 7);
  EXPECT_EQ(whole.value().Narrowed(0, 3, 4).Narrowed(1, 5, 3).Clone().ToVector(),
            part.value().ToVector());
  Parameter other({8, 10}, {"mlp", "embed"}, kNormal);
  other.set_name("b.weight");
  other.Materialize(DType::kF32);
  InitParameter(other, 7);
  EXPECT_NE(other.value().ToVector(), whole.value().ToVector());
}

TEST(Init, NormalHasItsMoments) {
  Parameter p({1000, 101}, {"mlp", "embed"}, kNormal);
  p.set_name("p");
  p.Materialize(DType::kF64);
  InitParameter(p, 3);
  double sum = 0, squares = 0, fourth = 0;
  const std::vector<double> values = p.value().ToVector();
  for (double v : values) {
    sum += v;
    squares += v * v;
    fourth += v * v * v * v;
  }
  const double n = static_cast<double>(values.size());
  EXPECT_NEAR(sum / n, 0, 0.01);
  EXPECT_NEAR(squares / n, 0.25, 0.005);
  EXPECT_NEAR(fourth / n, 3 * 0.0625, 0.01);
}

TEST(Parameter, FrozenParametersGetNoGradient) {
  Outer outer;
  MaterializeParameters(outer, DType::kF64, 1);
  outer.Parameters()[0]->set_requires_grad(false);
  Backward(ops::Sum(outer(Tensor::Full({1, 4}, DType::kF64, 1))));
  EXPECT_FALSE(outer.Parameters()[0]->leaf().grad.defined());
  EXPECT_TRUE(outer.Parameters()[1]->leaf().grad.defined());
}

}  // namespace
}  // namespace shoal
