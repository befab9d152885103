#include "optim/optimizer.h"

#include <algorithm>
#include <cmath>

#include "kernels/reduce.h"

namespace shoal {
namespace {

const Stream& CurrentStream() { return ExecutionContext::Current().stream(); }

View Flat(const Tensor& t) { return t.defined() ? t.Reshaped({-1}).view() : View(); }

}  // namespace

Optimizer::Optimizer(std::vector<std::shared_ptr<Parameter>> parameters,
                     const UpdateRuleOptions& options)
    : rule_(MakeUpdateRule(options)), state_names_(rule_->states()) {
  for (auto& parameter : parameters) {
    if (!parameter->requires_grad()) continue;
    const Tensor& value = parameter->value();
    const DType wide = AccumulatorDType(value.dtype());
    Entry entry;
    if (value.dtype() != wide) entry.master = value.To(wide, MemoryClass::kOptimizer);
    for (size_t i = 0; i < state_names_.size(); ++i) {
      entry.states.push_back(Tensor::Full(value.shape(), wide, 0, MemoryClass::kOptimizer));
    }
    entry.parameter = std::move(parameter);
    entries_.push_back(std::move(entry));
  }
}

double Optimizer::GradNorm() const {
  const Tensor squares = Tensor::Full({static_cast<int64_t>(entries_.size())}, DType::kF64, 0,
                                      MemoryClass::kWorkspace);
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Tensor& grad = entries_[i].parameter->leaf().grad;
    if (!grad.defined()) continue;
    kernels::SumSquares(CurrentStream(), squares.Narrowed(0, static_cast<int64_t>(i), 1).view(),
                        grad.view());
  }
  double sum = 0;
  for (double square : squares.ToVector()) sum += square;
  return std::sqrt(sum);
}

void Optimizer::Step(double lr, double gradient_scale) {
  ++step_;
  std::vector<View> states;
  for (const Entry& entry : entries_) {
    Leaf& leaf = entry.parameter->leaf();
    if (!leaf.grad.defined()) continue;
    states.clear();
    for (const Tensor& state : entry.states) states.push_back(Flat(state));
    const UpdateRule::Shard shard = {Flat(entry.parameter->value()), Flat(entry.master), states,
                                     Flat(leaf.grad), entry.parameter->decays()};
    rule_->Apply(CurrentStream(), shard, step_, lr, gradient_scale);
    leaf.grad = Tensor();
  }
}

void Optimizer::ZeroGrad() {
  for (const Entry& entry : entries_) entry.parameter->leaf().grad = Tensor();
}

std::vector<Optimizer::State> Optimizer::States() const {
  std::vector<State> all;
  for (const Entry& entry : entries_) {
    if (entry.master.defined()) all.push_back({"master", entry.parameter.get(), entry.master});
    for (size_t i = 0; i < state_names_.size(); ++i) {
      all.push_back({state_names_[i], entry.parameter.get(), entry.states[i]});
    }
  }
  return all;
}

double ClipScale(double norm, double clip) {
  return clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1;
}

}  // namespace shoal
