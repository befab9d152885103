#include "models/language_model.h"

#include "core/ops.h"

namespace shoal {

BlockList::BlockList(std::vector<std::shared_ptr<Block>> blocks) : blocks_(blocks.size()) {
  for (size_t i = 0; i < blocks.size(); ++i)
    AddChild(std::to_string(i), blocks_[i], std::move(blocks[i]));
}

LanguageModel::LanguageModel(const ModelConfig& config) : config_(config) {
  AddChild("embed", embed_,
           std::make_shared<Embedding>(config.vocab, config.d_model, "vocab", InitialWeights()));
}

void LanguageModel::AddBlocks(std::vector<std::shared_ptr<Block>> blocks,
                              std::shared_ptr<UnaryModule> norm) {
  AddChild("blocks", blocks_, std::make_shared<BlockList>(std::move(blocks)));
  AddChild("norm", norm_, std::move(norm));
  if (!config_.tied) {
    AddChild(
        "head", head_,
        std::make_shared<Embedding>(config_.vocab, config_.d_model, "vocab", InitialWeights()));
  }
  AddChild("loss", loss_, std::make_shared<LmLoss>());
}

void LanguageModel::Keep(const std::vector<bool>& segments) {
  const bool first = segments.front(), last = segments.back();
  if (!first && !(last && config_.tied)) RemoveChild("embed");
  for (size_t i = 0; i < blocks().size(); ++i)
    if (!segments[i + 1]) blocks_->Remove(i);
  if (last) return;
  RemoveChild("norm");
  if (head_) RemoveChild("head");
  RemoveChild("loss");
}

int LanguageModel::SegmentOf(const std::string& parameter) const {
  const auto within = [&](const char* module) { return parameter.starts_with(module); };
  if (within("blocks.")) return 1 + std::stoi(parameter.substr(std::string("blocks.").size()));
  return within("norm.") || within("head.") ? segments() - 1 : 0;
}

Tensor LanguageModel::Embed(const Tensor& tokens, const SequenceInfo&) {
  const OriginScope here(embed_->path());
  return embed_->Forward(tokens);
}

Tensor LanguageModel::Hidden(const Tensor& tokens, const SequenceInfo& info) {
  Tensor x = Embed(tokens, info);
  for (const auto& block : blocks()) x = (*block)(x, info);
  return Norm(x);
}

Tensor LanguageModel::Logits(const Tensor& hidden) {
  const OriginScope here((head_ ? head_ : embed_)->path());
  return ops::Linear(hidden, head_weight().Use());
}

Tensor LanguageModel::Loss(const Tensor& hidden, const Tensor& labels, double normalizer) {
  const OriginScope here(loss_->path());
  return loss_->Forward(hidden, head_weight(), labels, normalizer);
}

KvCache LanguageModel::MakeCache(int64_t batch, int64_t capacity, DType dtype) const {
  const OriginScope here("kv_cache");
  KvCache cache;
  const Dims shape = {batch, capacity, config_.kv_heads, config_.head_dim};
  for (int64_t i = 0; i < config_.layers; ++i) {
    cache.layers.push_back({Tensor::Empty(shape, dtype), Tensor::Empty(shape, dtype)});
  }
  return cache;
}

}  // namespace shoal
