// The learning rate as a pure function of the step.
#pragma once

#include <cstdint>
#include <string>

namespace shoal {

struct LrSchedule {
  std::string name = "cosine";  // "cosine", "linear", "wsd", "constant"
  double lr = 1e-3;             // the peak
  double min_fraction = 0.1;    // of lr, at the last step (cosine, linear, wsd)
  double decay_fraction =
      0.2;  // wsd: the share of all steps that decays (Hu et al., arXiv 2404.06395)
  int64_t warmup_steps = 0;  // lr grows linearly to the peak; may exceed `steps`
  int64_t steps = 1;         // all

  // Of step 1, 2, ..., steps.
  double At(int64_t step) const;
};

}  // namespace shoal
