// Sampling from a model, one token at a time over a KV cache.
#pragma once

#include <functional>
#include <span>

#include "models/language_model.h"

namespace shoal {

struct GenerateOptions {
  int64_t tokens = 200;
  double temperature = 1;  // 0: always the likeliest token
  int64_t top_k = 0;       // > 0: of the k likeliest
  double top_p = 1;        // < 1: of the likeliest that together reach this probability
  uint64_t seed = 0;       // token i is drawn with Philox(seed, i): the same text for the same seed
  int32_t stop = -1;       // generation ends when this id is drawn (it is not returned)
  // Generated ids are below this: a model's vocabulary may exceed its tokenizer's. 0: all.
  int64_t vocab_limit = 0;
};

// The new tokens. `prompt` must hold at least one id. When prompt and tokens exceed the model's
// context, the text goes on from its last half. Calls on_token after each, if set.
std::vector<int32_t> Generate(LanguageModel& model, std::span<const int32_t> prompt,
                              const GenerateOptions& options,
                              const std::function<void(int32_t)>& on_token = {});

}  // namespace shoal
