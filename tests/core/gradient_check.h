// Central finite differences in f64 through any composition of ops.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "core/ops.h"

namespace shoal::testing {

inline Tensor RandomTensor(const Dims& shape, uint32_t seed, double low = -1, double high = 1) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<double> values(static_cast<size_t>(shape.numel()));
  for (double& v : values) v = uniform(generator);
  return Tensor::From(values, shape);
}

// A tensor that wants a gradient, and where the gradient arrives.
struct Variable {
  Tensor value;
  std::shared_ptr<Leaf> leaf;
  explicit Variable(const Tensor& t)
      : value(t), leaf(std::make_shared<Leaf>(t.shape(), t.dtype())) {}
  Tensor Use() const {
    Tensor use = value.Detached();
    use.set_node(leaf);
    return use;
  }
};

// Compares the gradients of sum(f(inputs) * weights), for fixed random weights, with central
// differences at every element. Tolerance is relative to the largest gradient of each input.
inline void CheckGradients(const std::function<Tensor(const std::vector<Tensor>&)>& f,
                           const std::vector<Tensor>& inputs, double tolerance = 1e-7) {
  std::vector<Variable> variables;
  for (const Tensor& input : inputs) variables.emplace_back(input);
  std::vector<Tensor> uses;
  for (const Variable& v : variables) uses.push_back(v.Use());
  const Tensor out = f(uses);
  const Tensor weights = RandomTensor(out.shape(), 99);
  Backward(out, weights);
  const auto objective = [&] {
    const NoGrad no_grad;
    const std::vector<double> y = f(inputs).ToVector(), w = weights.ToVector();
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * w[i];
    return sum;
  };
  constexpr double kStep = 1e-5;
  for (size_t i = 0; i < inputs.size(); ++i) {
    ASSERT_TRUE(variables[i].leaf->grad.defined()) << "input " << i << " got no gradient";
    const std::vector<double> gradient = variables[i].leaf->grad.ToVector();
    double* values = inputs[i].data<double>();
    double largest = 1e-3, worst = 0;
    for (double g : gradient) largest = std::max(largest, std::abs(g));
    for (size_t j = 0; j < gradient.size(); ++j) {
      const double saved = values[j];
      values[j] = saved + kStep;
      const double above = objective();
      values[j] = saved - kStep;
      const double below = objective();
      values[j] = saved;
      const double off = std::abs(gradient[j] - (above - below) / (2 * kStep)) / largest;
      worst = std::isnan(off) ? HUGE_VAL : std::max(worst, off);
    }
    EXPECT_LT(worst, tolerance) << "input " << i << " of shape " << inputs[i].shape().ToString();
  }
}

}  // namespace shoal::testing
