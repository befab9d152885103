// LLaMA (Touvron et al., arXiv 2302.13971): RMSNorm before, RoPE, SwiGLU, grouped kv heads (Ainslie
// et al., arXiv 2305.13245), no biases.
#pragma once

#include "models/language_model.h"

namespace shoal {

class Llama : public LanguageModel {
 public:
  explicit Llama(const ModelConfig& config);
};

}  // namespace shoal
