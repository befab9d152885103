// The leaves that models are made of, and the slots that parallelisms fill. Transforms replace
// these by path; models hold them through their interface only.
#pragma once

#include <memory>
#include <string>

#include "core/module.h"
#include "core/sequence_info.h"
#include "kernels/attention.h"

namespace shoal {

// y [.., O] = x [.., I] weight [O, I]^T + bias [O].
class Linear : public UnaryModule {
 public:
  // `out_axis` and `in_axis` are the weight's logical axes; the bias has the first.
  Linear(int64_t in, int64_t out, const std::string& in_axis, const std::string& out_axis,
         bool with_bias, InitSpec init);

  const std::shared_ptr<Parameter>& weight() const { return weight_; }
  const std::shared_ptr<Parameter>& bias() const { return bias_; }  // null without

 protected:
  Tensor Forward(const Tensor& x) override;

 private:
  std::shared_ptr<Parameter> weight_, bias_;
};

// ids i32 [..] -> [.., D], from weight [V, D].
class Embedding : public Module {
 public:
  Embedding(int64_t rows, int64_t width, const std::string& row_axis, InitSpec init);
  explicit Embedding(std::shared_ptr<Parameter> weight);
  virtual Tensor Forward(const Tensor& ids);
  const std::shared_ptr<Parameter>& weight() const { return weight_; }

 private:
  std::shared_ptr<Parameter> weight_;
};

class RmsNorm : public UnaryModule {
 public:
  RmsNorm(int64_t width, double eps);

 protected:
  Tensor Forward(const Tensor& x) override;

 private:
  std::shared_ptr<Parameter> weight_;
  double eps_;
};

class LayerNorm : public UnaryModule {
 public:
  LayerNorm(int64_t width, double eps);

 protected:
  Tensor Forward(const Tensor& x) override;

 private:
  std::shared_ptr<Parameter> weight_, bias_;
  double eps_;
};

// Its mask is a function of (seed, site, token number, column); `site` tells dropouts apart.
class Dropout : public Module {
 public:
  Dropout(double p, std::string site);
  virtual Tensor Forward(const Tensor& x, const SequenceInfo& info);
  double p() const { return p_; }
  const std::string& site() const { return site_; }

 private:
  double p_;
  std::string site_;
  uint64_t stream_;
};

// Slot: softmax(q k^T) v, in training with dropout of the probabilities. Sequence parallelism
// replaces it.
class InnerAttention : public Module {
 public:
  InnerAttention() = default;
  // `site` tells layers apart, as Dropout's.
  InnerAttention(double dropout, const std::string& site);
  explicit InnerAttention(const kernels::AttentionDropout& dropout) : dropout_(dropout) {}
  // q [B, T, N, H]; k, v [B, S, K, H] with S >= T: the last T keys are those of the queries.
  virtual Tensor Forward(const Tensor& q, const Tensor& k, const Tensor& v,
                         const SequenceInfo& info);
  const kernels::AttentionDropout& dropout() const { return dropout_; }
  // The model's number of q's head 0, where heads are shared out.
  void set_first_head(int64_t head) { dropout_.first_head = head; }

 protected:
  // What acts in a forward with `info`, whose sequence_starts must be kept for backward.
  kernels::AttentionDropout DropoutIn(const SequenceInfo& info) const;

 private:
  kernels::AttentionDropout dropout_;  // but for the seed and sequence_starts
};

// Slot: the head's logits and their cross-entropy. Vocabulary parallelism replaces it.
class LmLoss : public Module {
 public:
  // x [.., D], weight [V, D], labels i32 [..] -> f64 [1]; see ops::LinearCrossEntropy.
  virtual Tensor Forward(const Tensor& x, const Parameter& weight, const Tensor& labels,
                         double normalizer);
};

}  // namespace shoal
