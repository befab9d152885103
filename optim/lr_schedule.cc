#include "optim/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/base/error.h"

namespace shoal {

double LrSchedule::At(int64_t step) const {
  if (step <= warmup_steps)
    return lr * static_cast<double>(step) / static_cast<double>(warmup_steps);
  if (name == "constant") return lr;
  const double low = lr * min_fraction;
  // Progress of the decay: 0 at its first step's predecessor, 1 at the last step.
  double begin = static_cast<double>(warmup_steps);
  const double end = static_cast<double>(steps);
  if (name == "wsd") begin = std::max(begin, std::floor(end * (1 - decay_fraction)));
  if (end <= begin) return lr;
  const double t = std::clamp((static_cast<double>(step) - begin) / (end - begin), 0.0, 1.0);
  if (name == "cosine") return low + (lr - low) * 0.5 * (1 + std::cos(std::numbers::pi * t));
  SHOAL_CHECK(name == "linear" || name == "wsd", "lr schedule", "no schedule '{}'", name);
  return low + (lr - low) * (1 - t);
}

}  // namespace shoal
