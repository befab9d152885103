#include "models/blocks.h"

#include <cmath>

#include "core/ops.h"

namespace shoal {
namespace {

// Adds a layer's new keys or values to the cache and returns all that it then holds.
Tensor Append(const Tensor& cache, int64_t length, const Tensor& fresh) {
  SHOAL_CHECK(length + fresh.dim(1) <= cache.dim(1), "kv cache", "{} tokens do not fit {}",
              length + fresh.dim(1), cache.dim(1));
  cache.Narrowed(1, length, fresh.dim(1)).CopyFrom(fresh);
  return cache.Narrowed(1, 0, length + fresh.dim(1));
}

}  // namespace

InitSpec InitialWeights() { return {InitSpec::Kind::kNormal, 0.02}; }

InitSpec InitialResidualWeights(const ModelConfig& config) {
  return {InitSpec::Kind::kNormal, 0.02 / std::sqrt(2.0 * static_cast<double>(config.layers))};
}

Attention::Attention(const ModelConfig& config, int layer, Options options)
    : layer_(layer), head_dim_(config.head_dim), rope_(options.rope), theta_(config.rope_theta) {
  const int64_t d = config.d_model, n = config.heads * head_dim_, k = config.kv_heads * head_dim_;
  const auto linear = [&](int64_t in, int64_t out, const char* in_axis, const char* out_axis,
                          InitSpec init) {
    return std::make_shared<Linear>(in, out, in_axis, out_axis, options.bias, init);
  };
  AddChild("q", q_, linear(d, n, "embed", "heads", InitialWeights()));
  AddChild("k", k_, linear(d, k, "embed", "kv_heads", InitialWeights()));
  AddChild("v", v_, linear(d, k, "embed", "kv_heads", InitialWeights()));
  AddChild("inner", inner_,
           std::make_shared<InnerAttention>(
               config.attention_dropout, "blocks." + std::to_string(layer) + ".attention.inner"));
  AddChild("out", out_, linear(n, d, "heads", "embed", InitialResidualWeights(config)));
}

Tensor Attention::Forward(const Tensor& x, const SequenceInfo& info) {
  const OriginScope here(path());
  // Not those of x: the rows of some of the tokens may be elsewhere.
  const int64_t b = info.positions.dim(0), t = info.positions.dim(1);
  // Sizes in full: there may be no tokens.
  const auto by_heads = [&](const Tensor& y) {
    return ops::Reshape(y, {b, t, y.dim(-1) / head_dim_, head_dim_});
  };
  Tensor q = by_heads((*q_)(x));  // [B, T, N, H]
  Tensor k = by_heads((*k_)(x));  // [B, T, K, H]
  Tensor v = by_heads((*v_)(x));
  if (rope_) {
    q = ops::Rope(q, info.positions, theta_);
    k = ops::Rope(k, info.positions, theta_);
  }
  if (info.cache != nullptr) {
    const KvCache::Layer& cache = info.cache->layers[static_cast<size_t>(layer_)];
    k = Append(cache.k, info.cache->length, k);
    v = Append(cache.v, info.cache->length, v);
  }
  const Tensor mixed = inner_->Forward(q, k, v, info);
  return (*out_)(ops::Reshape(mixed, {b, t, mixed.dim(2) * head_dim_}));
}

SwiGluMlp::SwiGluMlp(const ModelConfig& config) {
  const auto linear = [](int64_t in, int64_t out, const char* in_axis, const char* out_axis,
                         InitSpec init) {
    return std::make_shared<Linear>(in, out, in_axis, out_axis, false, init);
  };
  AddChild("gate", gate_, linear(config.d_model, config.mlp, "embed", "mlp", InitialWeights()));
  AddChild("up", up_, linear(config.d_model, config.mlp, "embed", "mlp", InitialWeights()));
  AddChild("down", down_,
           linear(config.mlp, config.d_model, "mlp", "embed", InitialResidualWeights(config)));
}

Tensor SwiGluMlp::Forward(const Tensor& x) { return (*down_)(ops::SwiGlu((*gate_)(x), (*up_)(x))); }

GeluMlp::GeluMlp(const ModelConfig& config) {
  AddChild(
      "up", up_,
      std::make_shared<Linear>(config.d_model, config.mlp, "embed", "mlp", true, InitialWeights()));
  AddChild("down", down_,
           std::make_shared<Linear>(config.mlp, config.d_model, "mlp", "embed", true,
                                    InitialResidualWeights(config)));
}

Tensor GeluMlp::Forward(const Tensor& x) { return (*down_)(ops::Gelu((*up_)(x))); }

Block::Block(const ModelConfig& config, int layer, std::shared_ptr<UnaryModule> attention_norm,
             std::shared_ptr<Attention> attention, std::shared_ptr<UnaryModule> mlp_norm,
             std::shared_ptr<UnaryModule> mlp) {
  const std::string site = "blocks." + std::to_string(layer);
  AddChild("attention_norm", attention_norm_, std::move(attention_norm));
  AddChild("attention", attention_, std::move(attention));
  AddChild("attention_dropout", attention_dropout_,
           std::make_shared<Dropout>(config.dropout, site + ".attention"));
  AddChild("mlp_norm", mlp_norm_, std::move(mlp_norm));
  AddChild("mlp", mlp_, std::move(mlp));
  AddChild("mlp_dropout", mlp_dropout_, std::make_shared<Dropout>(config.dropout, site + ".mlp"));
}

Tensor Block::operator()(const Tensor& x, const SequenceInfo& info) {
  // By value: the forward may be run again later.
  return Hooked(x, [this, info](const Tensor& in) {
    const Tensor mixed = ops::Add(
        in, attention_dropout_->Forward(attention_->Forward((*attention_norm_)(in), info), info));
    return ops::Add(mixed, mlp_dropout_->Forward((*mlp_)((*mlp_norm_)(mixed)), info));
  });
}

}  // namespace shoal
