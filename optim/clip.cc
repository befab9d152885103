#include "optim/clip.h"

#include <algorithm>

namespace shoal {

double ClipScale(double norm, double clip) {
  return clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1;
}

}  // namespace shoal
