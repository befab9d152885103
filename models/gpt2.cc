#include "models/gpt2.h"

#include "core/ops.h"

namespace shoal {
namespace {

std::vector<std::shared_ptr<Block>> Blocks(const ModelConfig& config) {
  std::vector<std::shared_ptr<Block>> blocks;
  for (int i = 0; i < config.layers; ++i) {
    const auto norm = [&] { return std::make_shared<LayerNorm>(config.d_model, config.norm_eps); };
    auto attention =
        std::make_shared<Attention>(config, i, Attention::Options{.bias = true, .rope = false});
    blocks.push_back(std::make_shared<Block>(config, i, norm(), std::move(attention), norm(),
                                             std::make_shared<GeluMlp>(config)));
  }
  return blocks;
}

}  // namespace

Gpt2::Gpt2(const ModelConfig& config) : LanguageModel(config) {
  AddChild(
      "position", position_,
      std::make_shared<Embedding>(config.context, config.d_model, "position", InitialWeights()));
  AddChild("embed_dropout", embed_dropout_, std::make_shared<Dropout>(config.dropout, "embed"));
  AddBlocks(Blocks(config), std::make_shared<LayerNorm>(config.d_model, config.norm_eps));
}

void Gpt2::Keep(const std::vector<bool>& segments) {
  LanguageModel::Keep(segments);
  if (segments.front()) return;
  RemoveChild("position");
  RemoveChild("embed_dropout");
}

Tensor Gpt2::Embed(const Tensor& tokens, const SequenceInfo& info) {
  const OriginScope here(position_->path());
  const Tensor x = ops::Add(LanguageModel::Embed(tokens, info), position_->Forward(info.positions));
  return embed_dropout_->Forward(x, info);
}

}  // namespace shoal
