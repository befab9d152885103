#include "models/llama.h"

namespace shoal {
namespace {

std::vector<std::shared_ptr<Block>> Blocks(const ModelConfig& config) {
  std::vector<std::shared_ptr<Block>> blocks;
  for (int i = 0; i < config.layers; ++i) {
    const auto norm = [&] { return std::make_shared<RmsNorm>(config.d_model, config.norm_eps); };
    auto attention =
        std::make_shared<Attention>(config, i, Attention::Options{.bias = false, .rope = true});
    blocks.push_back(std::make_shared<Block>(config, i, norm(), std::move(attention), norm(),
                                             std::make_shared<SwiGluMlp>(config)));
  }
  return blocks;
}

}  // namespace

Llama::Llama(const ModelConfig& config) : LanguageModel(config) {
  AddBlocks(Blocks(config), std::make_shared<RmsNorm>(config.d_model, config.norm_eps));
}

}  // namespace shoal
