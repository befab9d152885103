#include "kernels/optimizer.h"
#include "optim/update_rule.h"

namespace shoal {
namespace {

class Sgd : public UpdateRule {
 public:
  explicit Sgd(const UpdateRuleOptions& options) : options_(options) {}

  std::vector<std::string> states() const override {
    if (options_.momentum == 0) return {};
    return {"momentum"};
  }

  void Apply(const Stream& stream, const Shard& shard, int64_t step, double lr,
             double gradient_scale) const override {
    kernels::SgdOptions k;
    k.lr = lr;
    k.momentum = options_.momentum;
    k.weight_decay = shard.decays ? options_.weight_decay : 0;
    k.gradient_scale = gradient_scale;
    k.first = step == 1;
    kernels::Sgd(stream, shard.parameter, shard.master,
                 shard.states.empty() ? View() : shard.states[0], shard.gradient, k);
  }

 private:
  UpdateRuleOptions options_;
};

}  // namespace

std::unique_ptr<UpdateRule> MakeSgd(const UpdateRuleOptions& options) {
  return std::make_unique<Sgd>(options);
}

}  // namespace shoal
