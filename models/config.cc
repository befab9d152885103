#include "models/config.h"

#include "core/base/error.h"

namespace shoal {

void CheckModelConfig(const ModelConfig& c) {
  if (c.family != "llama" && c.family != "gpt2")
    SHOAL_FAIL(ErrorKind::kConfig, "model", "family \"{}\" is not one of \"llama\", \"gpt2\"",
               c.family);
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"layers", c.layers},     {"d_model", c.d_model},   {"heads", c.heads},
               {"kv_heads", c.kv_heads}, {"head_dim", c.head_dim}, {"mlp", c.mlp},
               {"vocab", c.vocab},       {"context", c.context}};
  for (const auto& [name, value] : sizes)
    if (value < 1)
      SHOAL_FAIL(ErrorKind::kConfig, "model", "{} is {}, but must be at least 1", name, value);
  if (c.heads % c.kv_heads != 0)
    SHOAL_FAIL(ErrorKind::kConfig, "model",
               "kv_heads {} does not divide heads {}: each kv head serves the same number of heads",
               c.kv_heads, c.heads);
  if (c.family == "gpt2") {
    if (c.kv_heads != c.heads)
      SHOAL_FAIL(ErrorKind::kConfig, "model", "gpt2 has as many kv_heads as heads, not {} and {}",
                 c.kv_heads, c.heads);
  } else if (c.head_dim % 2 != 0) {
    SHOAL_FAIL(ErrorKind::kConfig, "model",
               "head_dim {} is odd, but RoPE rotates pairs: choose heads so that d_model {} / "
               "heads is even",
               c.head_dim, c.d_model);
  }
}

int64_t ParameterCount(const ModelConfig& c) {
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  const int64_t projections = c.d_model * (q + 2 * kv) + q * c.d_model;
  const int64_t head = c.tied ? 0 : c.vocab * c.d_model;
  if (c.family == "gpt2") {
    const int64_t biases = q + 2 * kv + c.d_model + c.mlp + c.d_model;
    const int64_t block = 4 * c.d_model + projections + 2 * c.d_model * c.mlp + biases;
    return (c.vocab + c.context) * c.d_model + c.layers * block + 2 * c.d_model + head;
  }
  const int64_t block = 2 * c.d_model + projections + 3 * c.d_model * c.mlp;
  return c.vocab * c.d_model + c.layers * block + c.d_model + head;
}

std::vector<double> SegmentCosts(const ModelConfig& c, int64_t length) {
  const auto d = static_cast<double>(c.d_model), head = static_cast<double>(c.head_dim);
  const double q = static_cast<double>(c.heads) * head, kv = static_cast<double>(c.kv_heads) * head;
  const double products = c.family == "gpt2" ? 2 : 3;  // of the mlp
  const double weights = d * (2 * q + 2 * kv) + products * d * static_cast<double>(c.mlp);
  // Scores and values over the half of the sequence that a token sees.
  const double block = 2 * weights + 2 * q * static_cast<double>(length);
  std::vector<double> costs(static_cast<size_t>(c.layers) + 2, block);
  costs.front() = d;
  costs.back() = 2 * d * static_cast<double>(c.vocab);
  return costs;
}

}  // namespace shoal
