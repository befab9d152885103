// A decoder-only language model as an ordered list: embedding, blocks, norm, head. Written for one
// process; pipelines cut the list, and every other parallelism enters below it.
#pragma once

#include "core/layers.h"
#include "models/blocks.h"
#include "models/config.h"

namespace shoal {

class BlockList : public Module {
 public:
  explicit BlockList(std::vector<std::shared_ptr<Block>> blocks);
  const std::vector<std::shared_ptr<Block>>& blocks() const { return blocks_; }
  void Remove(size_t i) { RemoveChild(std::to_string(i)); }

 private:
  std::vector<std::shared_ptr<Block>> blocks_;
};

class LanguageModel : public Module {
 public:
  const ModelConfig& config() const { return config_; }
  const std::vector<std::shared_ptr<Block>>& blocks() const { return blocks_->blocks(); }

  // The model is a list of segments: the embedding, each block, and the final norm with the head
  // and the loss. Takes away what only the other segments use; parameters keep their names.
  static constexpr int kOtherSegments = 2;
  int segments() const { return static_cast<int>(blocks().size()) + kOtherSegments; }
  virtual void Keep(const std::vector<bool>& segments);
  // Where a parameter of the whole model is used; a tied head's weight where it embeds.
  int SegmentOf(const std::string& parameter) const;
  // A tied head's weight, or null.
  Parameter* tied_weight() const { return head_ ? nullptr : embed_->weight().get(); }

  // tokens i32 [B, T] -> [B, T, D]
  virtual Tensor Embed(const Tensor& tokens, const SequenceInfo& info);
  Tensor Norm(const Tensor& x) { return (*norm_)(x); }
  // Embedding, blocks and final norm.
  Tensor Hidden(const Tensor& tokens, const SequenceInfo& info);
  // hidden [.., D] -> [.., V]
  Tensor Logits(const Tensor& hidden);
  // f64 [1]: sum of the labels' negative log likelihoods over `normalizer`. labels i32 [B, T]; a
  // negative label is ignored.
  Tensor Loss(const Tensor& hidden, const Tensor& labels, double normalizer);

  // For `batch` sequences of up to `capacity` tokens, empty.
  KvCache MakeCache(int64_t batch, int64_t capacity, DType dtype) const;

 protected:
  // Children stand in the order in which forward uses them, which is the reverse of that in which
  // gradients come: what a family embeds with beside the tokens comes before the blocks.
  explicit LanguageModel(const ModelConfig& config);
  void AddBlocks(std::vector<std::shared_ptr<Block>> blocks, std::shared_ptr<UnaryModule> norm);

 private:
  ModelConfig config_;
  std::shared_ptr<Embedding> embed_;
  std::shared_ptr<BlockList> blocks_;
  std::shared_ptr<UnaryModule> norm_;
  std::shared_ptr<Embedding> head_;  // null when tied: the head's rows are the embedding's
  std::shared_ptr<LmLoss> loss_;

  const Parameter& head_weight() const { return head_ ? *head_->weight() : *embed_->weight(); }
};

}  // namespace shoal
