// Clipping by the global norm (Pascanu et al., arXiv 1211.5063).
#pragma once

namespace shoal {

// What to multiply gradients of this global norm by, so that it is at most `clip` (0: never clip).
// As PyTorch's clip_grad_norm_: min(1, clip / (norm + 1e-6)).
double ClipScale(double norm, double clip);

}  // namespace shoal
