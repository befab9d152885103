#include "kernels/optimizer.h"
#include "optim/update_rule.h"

namespace shoal {
namespace {

class AdamW : public UpdateRule {
 public:
  explicit AdamW(const UpdateRuleOptions& options) : options_(options) {}

  std::vector<std::string> states() const override { return {"m", "v"}; }

  void Apply(const Stream& stream, const Shard& shard, int64_t step, double lr,
             double gradient_scale) const override {
    kernels::AdamWOptions k;
    k.lr = lr;
    k.beta1 = options_.beta1;
    k.beta2 = options_.beta2;
    k.eps = options_.eps;
    k.weight_decay = shard.decays ? options_.weight_decay : 0;
    k.step = step;
    k.gradient_scale = gradient_scale;
    kernels::AdamW(stream, shard.parameter, shard.master, shard.states[0], shard.states[1],
                   shard.gradient, k);
  }

 private:
  UpdateRuleOptions options_;
};

}  // namespace

std::unique_ptr<UpdateRule> MakeAdamW(const UpdateRuleOptions& options) {
  return std::make_unique<AdamW>(options);
}

}  // namespace shoal
