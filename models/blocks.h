// Transformer blocks, shared by the model families. Heads are split as view(.., -1, head_dim),
// never by a global count, so a block works on whatever share of the heads its projections hold.
#pragma once

#include "core/layers.h"
#include "models/config.h"

namespace shoal {

// Standard deviations of the initial weights: 0.02, and 0.02 / sqrt(2 L) for the projections that
// add into the residual stream (Radford et al., "Language models are unsupervised multitask
// learners", 2.3).
InitSpec InitialWeights();
InitSpec InitialResidualWeights(const ModelConfig& config);

class Attention : public Module {
 public:
  struct Options {
    bool bias = false;
    bool rope = true;
  };
  Attention(const ModelConfig& config, int layer, Options options);
  Tensor Forward(const Tensor& x, const SequenceInfo& info);  // [B, T, D] or rows of it -> the same

 private:
  int layer_;
  int64_t head_dim_;
  bool rope_;
  double theta_;
  std::shared_ptr<UnaryModule> q_, k_, v_, out_;
  std::shared_ptr<InnerAttention> inner_;
};

// down(silu(gate(x)) up(x)), without biases.
class SwiGluMlp : public UnaryModule {
 public:
  explicit SwiGluMlp(const ModelConfig& config);

 protected:
  Tensor Forward(const Tensor& x) override;

 private:
  std::shared_ptr<UnaryModule> gate_, up_, down_;
};

// down(gelu(up(x))), with biases.
class GeluMlp : public UnaryModule {
 public:
  explicit GeluMlp(const ModelConfig& config);

 protected:
  Tensor Forward(const Tensor& x) override;

 private:
  std::shared_ptr<UnaryModule> up_, down_;
};

// x + attention(norm(x)), then x + mlp(norm(x)). What pipelines cut between and ZeRO 3 gathers by.
class Block : public Module {
 public:
  Block(const ModelConfig& config, int layer, std::shared_ptr<UnaryModule> attention_norm,
        std::shared_ptr<Attention> attention, std::shared_ptr<UnaryModule> mlp_norm,
        std::shared_ptr<UnaryModule> mlp);
  Tensor operator()(const Tensor& x, const SequenceInfo& info);  // [B, T, D] -> [B, T, D]

 private:
  std::shared_ptr<UnaryModule> attention_norm_, mlp_norm_, mlp_;
  std::shared_ptr<Attention> attention_;
  std::shared_ptr<Dropout> attention_dropout_, mlp_dropout_;
};

}  // namespace shoal
