// The shape of a model: everything that is needed to build it, and nothing about how it is trained.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace shoal {

struct ModelConfig {
  std::string family = "llama";  // "llama" (RMSNorm, RoPE, SwiGLU, no biases) or "gpt2"
  int64_t layers = 0;
  int64_t d_model = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;  // divides heads; gpt2 has as many as heads
  int64_t head_dim = 0;  // mostly d_model / heads, but need not be
  int64_t mlp = 0;       // width of the hidden layer
  int64_t vocab = 0;
  int64_t context = 0;  // longest sequence; rows of gpt2's table of positions
  bool tied = false;    // the head uses the embedding's weights
  double dropout = 0.0;
  double attention_dropout = 0.0;  // of attention's probabilities
  double rope_theta = 10000.0;     // llama only
  double norm_eps = 1e-5;

  bool operator==(const ModelConfig&) const = default;
};

// Throws Error(kConfig) that names the two sizes that do not fit together.
void CheckModelConfig(const ModelConfig& config);

// Weights of the whole model, a tied head counted once.
int64_t ParameterCount(const ModelConfig& config);

// FLOPs per token of each segment (LanguageModel::segments), forward, in sequences of `length`
// tokens. Looking up the embedding counts as the copy that it is.
std::vector<double> SegmentCosts(const ModelConfig& config, int64_t length);

}  // namespace shoal
