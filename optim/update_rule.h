// How a parameter moves, given its gradient: one rule per file. A rule works on flat shards, so
// sharding (ZeRO), offload and checkpoints are written once for all rules.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/base/stream.h"
#include "core/base/view.h"

namespace shoal {

struct UpdateRuleOptions {
  std::string name = "adamw";
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;  // adamw
  double weight_decay = 0;                       // of matrices; 0 is passed for the others
  double momentum = 0;                           // sgd
};

class UpdateRule {
 public:
  virtual ~UpdateRule() = default;

  // Names of the state arrays that the rule keeps per parameter, each as long as the parameter, in
  // the accumulator dtype, zero at first.
  virtual std::vector<std::string> states() const = 0;

  struct Shard {
    View parameter;          // [n], what the model computes with
    View master;             // [n] if the parameter is narrower than f32: f32, or i16 (split)
    std::span<View> states;  // [n] each, in the order of states()
    View gradient;           // [n], any float dtype
    bool decays = false;
  };
  // step counts from 1. The gradient is multiplied by gradient_scale as it is read.
  virtual void Apply(const Stream& stream, const Shard& shard, int64_t step, double lr,
                     double gradient_scale) const = 0;
};

// By options.name; Error(kConfig) naming the known ones otherwise.
std::unique_ptr<UpdateRule> MakeUpdateRule(const UpdateRuleOptions& options);

std::unique_ptr<UpdateRule> MakeAdamW(const UpdateRuleOptions& options);
std::unique_ptr<UpdateRule> MakeSgd(const UpdateRuleOptions& options);

}  // namespace shoal
