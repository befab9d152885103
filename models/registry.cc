#include "models/registry.h"

#include "models/gpt2.h"
#include "models/llama.h"

namespace shoal {

std::shared_ptr<LanguageModel> BuildModel(const ModelConfig& config) {
  CheckModelConfig(config);
  if (config.family == "llama") return std::make_shared<Llama>(config);
  if (config.family == "gpt2") return std::make_shared<Gpt2>(config);
  SHOAL_FAIL(ErrorKind::kConfig, "model", "no family '{}'; there are llama and gpt2",
             config.family);
}

}  // namespace shoal
