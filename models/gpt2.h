// GPT-2 (Radford et al., "Language models are unsupervised multitask learners"): LayerNorm before,
// learned positions, GELU, biases, head tied to the embedding.
#pragma once

#include "models/language_model.h"

namespace shoal {

class Gpt2 : public LanguageModel {
 public:
  explicit Gpt2(const ModelConfig& config);
  void Keep(const std::vector<bool>& segments) override;
  Tensor Embed(const Tensor& tokens, const SequenceInfo& info) override;

 private:
  std::shared_ptr<Embedding> position_;
  std::shared_ptr<Dropout> embed_dropout_;
};

}  // namespace shoal
