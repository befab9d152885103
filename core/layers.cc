#include "core/layers.h"

#include <cmath>

#include "core/ops.h"

namespace shoal {

Linear::Linear(int64_t in, int64_t out, const std::string& in_axis, const std::string& out_axis,
               bool with_bias, InitSpec init) {
  weight_ = AddParameter(
      "weight", std::make_shared<Parameter>(Dims{out, in}, std::vector{out_axis, in_axis}, init));
  if (with_bias) {
    bias_ = AddParameter("bias",
                         std::make_shared<Parameter>(Dims{out}, std::vector{out_axis}, InitSpec{}));
  }
}

Tensor Linear::Forward(const Tensor& x) {
  return ops::Linear(x, weight_->Use(), bias_ ? bias_->Use() : Tensor());
}

Embedding::Embedding(int64_t rows, int64_t width, const std::string& row_axis, InitSpec init) {
  weight_ = AddParameter(
      "weight", std::make_shared<Parameter>(Dims{rows, width},
                                            std::vector<std::string>{row_axis, "embed"}, init));
}

Embedding::Embedding(std::shared_ptr<Parameter> weight)
    : weight_(AddParameter("weight", std::move(weight))) {}

Tensor Embedding::Forward(const Tensor& ids) { return ops::Embedding(weight_->Use(), ids); }

RmsNorm::RmsNorm(int64_t width, double eps) : eps_(eps) {
  weight_ = AddParameter("weight",
                         std::make_shared<Parameter>(Dims{width}, std::vector<std::string>{"embed"},
                                                     InitSpec{InitSpec::Kind::kOnes}));
}

Tensor RmsNorm::Forward(const Tensor& x) { return ops::RmsNorm(x, weight_->Use(), eps_); }

LayerNorm::LayerNorm(int64_t width, double eps) : eps_(eps) {
  const std::vector<std::string> axes = {"embed"};
  weight_ = AddParameter(
      "weight", std::make_shared<Parameter>(Dims{width}, axes, InitSpec{InitSpec::Kind::kOnes}));
  bias_ = AddParameter("bias", std::make_shared<Parameter>(Dims{width}, axes, InitSpec{}));
}

Tensor LayerNorm::Forward(const Tensor& x) {
  return ops::LayerNorm(x, weight_->Use(), bias_->Use(), eps_);
}

Dropout::Dropout(double p, std::string site)
    : p_(p), site_(std::move(site)), stream_(HashName(site_)) {}

Tensor Dropout::Forward(const Tensor& x, const SequenceInfo& info) {
  if (!info.training || p_ == 0) return x;
  const OriginScope here(path());
  return ops::Dropout(x, info.token_numbers, p_, PhiloxKey{info.seed, stream_});
}

InnerAttention::InnerAttention(double dropout, const std::string& site) {
  dropout_.p = dropout;
  dropout_.key.stream = HashName(site);
}

kernels::AttentionDropout InnerAttention::DropoutIn(const SequenceInfo& info) const {
  if (!info.training || dropout_.p == 0) return {};
  SHOAL_CHECK(info.sequence_starts.defined(), "attention",
              "dropout needs SequenceInfo::sequence_starts");
  kernels::AttentionDropout dropout = dropout_;
  dropout.key.seed = info.seed;
  dropout.sequence_starts = info.sequence_starts.view();
  return dropout;
}

Tensor InnerAttention::Forward(const Tensor& q, const Tensor& k, const Tensor& v,
                               const SequenceInfo& info) {
  kernels::AttentionOptions options;
  options.scale = 1 / std::sqrt(static_cast<double>(q.dim(-1)));
  options.query_offset = k.dim(1) - q.dim(1);
  options.dropout = DropoutIn(info);
  return ops::Attention(q, k, v, info.documents, info.documents, options, info.sequence_starts).out;
}

Tensor LmLoss::Forward(const Tensor& x, const Parameter& weight, const Tensor& labels,
                       double normalizer) {
  return ops::LinearCrossEntropy(x, weight.Use(), labels, normalizer);
}

}  // namespace shoal
