// Whether a configuration computes on many ranks what one rank does: both are trained side by side,
// on threads of this process, and compared after every step.
#pragma once

#include <optional>
#include <string>

#include "launch/config.h"

namespace shoal {

struct Verification {
  struct Difference {
    int64_t step = 0;
    std::string what;   // "loss", "grad_norm", or a parameter
    int64_t index = 0;  // of the element, in a parameter
    double one_rank = 0, ranks = 0;
  };
  int64_t steps = 0;
  double max_relative_difference = 0;  // of losses, norms and parameters
  std::optional<Difference> first;     // beyond the tolerance
};

// How far apart rounding may take a run on many ranks and on one, relative. fp64 is a proof; fp32
// compares parameters in L2, as one element of AdamW's may move by its sign; bf16 rounds every
// product, and says only that nothing is grossly wrong.
struct Tolerance {
  double scalar, parameter;
  bool l2;
};
Tolerance ToleranceOf(const Config& config);

Verification Verify(const Config& config, int ranks, int64_t steps);

std::string VerificationJson(const Verification& v);
std::string VerificationText(const Verification& v, const Config& config, int ranks);

}  // namespace shoal
