// Applies an update rule to all parameters and keeps its state.
#pragma once

#include <memory>
#include <vector>

#include "core/parameter.h"
#include "optim/update_rule.h"

namespace shoal {

class Optimizer {
 public:
  // Allocates states (and f32 masters for parameters narrower than that, holding their values) now,
  // so that memory is known before the first step.
  Optimizer(std::vector<std::shared_ptr<Parameter>> parameters, const UpdateRuleOptions& options);

  // The global L2 norm of the gradients, in f64 and in a fixed order.
  double GradNorm() const;
  // Moves every parameter that has a gradient, and drops the gradients.
  void Step(double lr, double gradient_scale);
  void ZeroGrad();

  int64_t step() const { return step_; }  // steps taken
  void set_step(int64_t step) { step_ = step; }

  // What a checkpoint must hold besides the parameters: "master", "m", ... of each parameter.
  struct State {
    std::string name;
    const Parameter* parameter;
    Tensor tensor;
  };
  std::vector<State> States() const;

 private:
  struct Entry {
    std::shared_ptr<Parameter> parameter;
    Tensor master;  // undefined where the parameter is its own
    std::vector<Tensor> states;
  };
  std::unique_ptr<UpdateRule> rule_;
  std::vector<std::string> state_names_;
  std::vector<Entry> entries_;
  int64_t step_ = 0;
};

// What the gradient is multiplied by so that its norm does not exceed `clip` (0: never clipped):
// min(1, clip / (norm + 1e-6)), PyTorch's clip_grad_norm_ to the digit.
double ClipScale(double norm, double clip);

}  // namespace shoal
