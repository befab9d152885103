#include "optim/update_rule.h"

namespace shoal {

std::unique_ptr<UpdateRule> MakeUpdateRule(const UpdateRuleOptions& options) {
  if (options.name == "adamw") return MakeAdamW(options);
  if (options.name == "sgd") return MakeSgd(options);
  SHOAL_FAIL(ErrorKind::kConfig, "optim", "no optimizer '{}'; there are adamw and sgd",
             options.name);
}

}  // namespace shoal
