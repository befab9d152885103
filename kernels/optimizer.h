// One pass over a flat shard of parameters per optimizer rule.
#pragma once

#include "kernels/dispatch.h"

namespace shoal::kernels {

struct AdamWOptions {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
  int64_t step = 1;           // counts from 1: the bias corrections
  double gradient_scale = 1;  // of the gradient as it is read: the clip factor
};

// AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2, decay scaled by lr as in PyTorch):
//   m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
//   p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
// All are flat [n]. m, v f32 (f64 for f64). gradient: any float dtype. A parameter of bf16 has a
// master, which others lack ({}): f32, the exact parameter; or i16, what the exact parameter is
// beside `parameter` (Split in core/base/float_types.h), which is read then, too. That takes two
// bytes less (Split-SGD-BF16: Kalamkar et al., arXiv 2005.04680, which truncates where this
// rounds); both give the same exact parameters, and models see the same but where they are ties.
SHOAL_KERNEL(AdamW,
             (const Stream& stream, const View& parameter, const View& master, const View& m,
              const View& v, const View& gradient, const AdamWOptions& options),
             (stream, parameter, master, m, v, gradient, options))

struct SgdOptions {
  double lr = 1e-2, momentum = 0, weight_decay = 0;
  double gradient_scale = 1;
  bool first = true;  // the momentum buffer is not read on the first step
};

// SGD with momentum as in PyTorch: g += wd p; u = momentum u + g (u = g at first); p -= lr u.
// momentum may be absent ({}) when options.momentum is 0.
SHOAL_KERNEL(Sgd,
             (const Stream& stream, const View& parameter, const View& master, const View& momentum,
              const View& gradient, const SgdOptions& options),
             (stream, parameter, master, momentum, gradient, options))

}  // namespace shoal::kernels
