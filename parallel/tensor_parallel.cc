#include "parallel/tensor_parallel.h"

#include <cmath>

#include "core/base/mutation.h"
#include "core/ops.h"
#include "core/placement_rules.h"
#include "kernels/elementwise.h"
#include "parallel/collectives.h"

namespace shoal {
namespace {

using Range = AxisCut::Range;

std::vector<Range> Deal(int64_t n, int ranks, int64_t step = 1) {
  std::vector<Range> ranges;
  for (int r = 0; r < ranks; ++r)
    ranges.push_back({ShardBegin(n, r, ranks) * step, ShardBegin(n, r + 1, ranks) * step});
  return ranges;
}

// What lies between the parts that are split: values that are whole on all ranks, or each rank's
// share of the tokens' rows.
class Region {
 public:
  Region(Communicator& group, bool by_tokens) : group_(group), by_tokens_(by_tokens) {}
  Communicator& group() const { return group_; }
  // A forward over `tokens` rows begins.
  void Begin(int64_t tokens) {
    bounds_ = ShardBounds(tokens, group_.size());
    Forget();
  }

  void Forget() { last_ = entered_ = Tensor(); }
  // Into split work. Consecutive uses of one value share what comes of it, so that it is gathered
  // once, and its gradient summed once.
  Tensor Enter(const Tensor& x) {
    if (!last_.defined() || !x.is(last_)) {
      entered_ =
          by_tokens_ ? collectives::AllGather(x, bounds_, group_) : collectives::Enter(x, group_);
      last_ = x;
    }
    return entered_;
  }
  // parts [.., D] of a sum -> the sum [.., D], or this rank's rows of it [M, D].
  Tensor Leave(const Tensor& parts, DType dtype) {
    Forget();
    if (!by_tokens_) return collectives::AllReduce(parts, group_, dtype);
    const Tensor rows = ops::Reshape(parts, {-1, parts.dim(-1)});
    return collectives::ReduceScatter(rows, bounds_, group_, dtype);
  }
  // One number or id per token [..] -> this rank's [M].
  Tensor Mine(const Tensor& per_token) const {
    const auto r = static_cast<size_t>(group_.rank());
    const Tensor flat = per_token.Reshaped({-1});
    const Tensor mine = flat.Narrowed(0, bounds_[r], bounds_[r + 1] - bounds_[r]);
    Placement placement = ReshapedPlacement("rows", per_token, flat.shape());
    if (group_.axis()) placement.Set(*group_.axis(), AxisPlacement::Sharded(0));
    mine.set_placement(placement);
    return mine;
  }

 private:
  Communicator& group_;
  bool by_tokens_;
  std::vector<int64_t> bounds_;
  Tensor last_, entered_;
};

class ColumnLinear : public UnaryModule {
 public:
  ColumnLinear(const Linear& whole, std::shared_ptr<Region> region)
      : region_(std::move(region)), weight_(AddParameter("weight", whole.weight())) {
    if (whole.bias()) bias_ = AddParameter("bias", whole.bias());
  }

 protected:
  Tensor Forward(const Tensor& x) override {
    return ops::Linear(region_->Enter(x), weight_->Use(), bias_ ? bias_->Use() : Tensor());
  }

 private:
  std::shared_ptr<Region> region_;
  std::shared_ptr<Parameter> weight_, bias_;
};

class RowLinear : public UnaryModule {
 public:
  RowLinear(const Linear& whole, std::shared_ptr<Region> region)
      : region_(std::move(region)), weight_(AddParameter("weight", whole.weight())) {
    if (whole.bias()) bias_ = AddParameter("bias", whole.bias());
  }

 protected:
  Tensor Forward(const Tensor& x) override {
    // The sum has the bias once: the others' is empty.
    const bool first = bias_ != nullptr && bias_->shape().numel() > 0;
    const Tensor part = ops::Linear(x, weight_->Use(), first ? bias_->Use() : Tensor(), true);
    return region_->Leave(part, x.dtype());
  }

 private:
  std::shared_ptr<Region> region_;
  std::shared_ptr<Parameter> weight_, bias_;
};

class ShardedEmbedding : public Embedding {
 public:
  ShardedEmbedding(const Embedding& whole, std::shared_ptr<Region> region)
      : Embedding(whole.weight()), region_(std::move(region)) {}

  Tensor Forward(const Tensor& ids) override {
    const Parameter& p = *weight();
    const Tensor rows = ops::Embedding(p.Use(), ids, {p.offset()[0], p.global_shape()[0]});
    return region_->Leave(rows, rows.dtype());
  }

 private:
  std::shared_ptr<Region> region_;
};

// A whole table, looked up for this rank's tokens.
class RowsEmbedding : public Embedding {
 public:
  RowsEmbedding(const Embedding& whole, std::shared_ptr<Region> region)
      : Embedding(whole.weight()), region_(std::move(region)) {}

  Tensor Forward(const Tensor& ids) override { return Embedding::Forward(region_->Mine(ids)); }

 private:
  std::shared_ptr<Region> region_;
};

class RowsDropout : public Dropout {
 public:
  RowsDropout(const Dropout& whole, std::shared_ptr<Region> region)
      : Dropout(whole.p(), whole.site()), region_(std::move(region)) {}

  Tensor Forward(const Tensor& x, const SequenceInfo& info) override {
    SequenceInfo mine = info;
    mine.token_numbers = region_->Mine(info.token_numbers);
    return Dropout::Forward(x, mine);
  }

 private:
  std::shared_ptr<Region> region_;
};

class ShardedLmLoss : public LmLoss {
 public:
  explicit ShardedLmLoss(std::shared_ptr<Region> region)
      : group_(region->group()), region_(std::move(region)) {}

  Tensor Forward(const Tensor& x, const Parameter& weight, const Tensor& labels,
                 double normalizer) override {
    kernels::VocabularyShare share;
    share.first = weight.offset()[0];
    share.size = weight.global_shape()[0];
    share.merge = [this](double* rows, int64_t n) { Merge(rows, n); };
    const Tensor entered = region_->Enter(x);
    region_->Forget();
    return ops::LinearCrossEntropy(entered, weight.Use(), labels, normalizer, &share);
  }

 private:
  // Milakov and Gimelshein, arXiv 1805.02867: sums over parts, each relative to its own maximum.
  void Merge(double* rows, int64_t n) {
    std::vector<double> max(static_cast<size_t>(n)), sums(static_cast<size_t>(2 * n));
    for (int64_t i = 0; i < n; ++i) max[static_cast<size_t>(i)] = rows[3 * i];
    const View max_view(max.data(), DType::kF64, {n});
    group_.AllReduce(std::span(&max_view, 1), ReduceOp::kMax, Traffic::kControl);
    for (int64_t i = 0; i < n; ++i) {
      const double whole = max[static_cast<size_t>(i)];
      sums[static_cast<size_t>(2 * i)] =
          rows[3 * i + 1] == 0 ? 0 : rows[3 * i + 1] * std::exp(rows[3 * i] - whole);
      sums[static_cast<size_t>(2 * i + 1)] = rows[3 * i + 2];
    }
    const View sum_view(sums.data(), DType::kF64, {2 * n});
    group_.AllReduce(std::span(&sum_view, 1), ReduceOp::kSum, Traffic::kControl);
    for (int64_t i = 0; i < n; ++i) {
      rows[3 * i] = max[static_cast<size_t>(i)];
      rows[3 * i + 1] = sums[static_cast<size_t>(2 * i)];
      rows[3 * i + 2] = sums[static_cast<size_t>(2 * i + 1)];
    }
  }

  Communicator& group_;
  std::shared_ptr<Region> region_;
};

// x [B, T, K, H] -> [B, T, N, H]: for each of N query heads its kv head.
Tensor ExpandHeads(const Tensor& x, const std::vector<int64_t>& kv_of_query) {
  const OriginScope here("expand_heads");
  Dims shape = x.shape();
  shape[2] = static_cast<int64_t>(kv_of_query.size());
  const Tensor out = Tensor::Empty(shape, x.dtype());
  for (size_t i = 0; i < kv_of_query.size(); ++i)
    out.Narrowed(2, static_cast<int64_t>(i), 1).CopyFrom(x.Narrowed(2, kv_of_query[i], 1));
  return Record("expand_heads", out, {x}, {},
                [kv_of_query, shape = x.shape(), dtype = x.dtype()](GradContext& context) {
                  const Stream& stream = ExecutionContext::Current().stream();
                  const Tensor dout = context.grad();
                  // Summed in at least f32: a head may serve many queries.
                  Dims one = shape;
                  one[2] = 1;
                  const Tensor dx = Tensor::Empty(shape, dtype);
                  for (int64_t k = 0; k < shape[2]; ++k) {
                    const Tensor sum = Tensor::Full(one, AccumulatorDType(dtype), 0);
                    for (size_t i = 0; i < kv_of_query.size(); ++i) {
                      if (kv_of_query[i] != k) continue;
                      const Tensor part = dout.Narrowed(2, static_cast<int64_t>(i), 1).Clone();
                      kernels::Add(stream, sum.view(), sum.view(), part.view(), 1, 1);
                    }
                    dx.Narrowed(2, k, 1).CopyFrom(sum);
                  }
                  context.Give(0, dx);
                });
}

// Attention whose query heads do not share the kv heads in equal groups.
class MappedAttention : public InnerAttention {
 public:
  MappedAttention(std::vector<int64_t> kv_of_query, const kernels::AttentionDropout& dropout)
      : kv_of_query_(std::move(kv_of_query)) {
    AddChild("inner", inner_, std::make_shared<InnerAttention>(dropout));
  }

  Tensor Forward(const Tensor& q, const Tensor& k, const Tensor& v,
                 const SequenceInfo& info) override {
    return inner_->Forward(q, ExpandHeads(k, kv_of_query_), ExpandHeads(v, kv_of_query_), info);
  }

 private:
  std::shared_ptr<InnerAttention> inner_;
  std::vector<int64_t> kv_of_query_;
};

void SumGradient(Parameter& p, Communicator& group) {
  p.set_gradient_sum([&group](const Tensor& gradient) {
    if (Mutated(Mutation::kNormWeightNotSummed)) return;
    const View view = gradient.view();
    group.AllReduce(std::span(&view, 1));
  });
}

// Of a head h that several ranks hold, the first of them counts; all sum its gradient.
void ShareOverlap(Parameter& p, const std::vector<Range>& ranges, Communicator& group) {
  const Range mine = ranges[static_cast<size_t>(group.rank())];
  bool overlap = false;
  for (size_t r = 1; r < ranges.size(); ++r) overlap |= ranges[r].begin < ranges[r - 1].end;
  if (!overlap) return;
  const int64_t before =
      group.rank() == 0
          ? 0
          : std::max<int64_t>(0, ranges[static_cast<size_t>(group.rank()) - 1].end - mine.begin);
  const int64_t width = p.shape().numel() / std::max<int64_t>(mine.size(), 1);
  p.set_owned(before * width, (mine.size() - before) * width);
  // Everybody's rows, each where it belongs; what is shared adds up.
  p.set_gradient_sum([&group, mine, all = p.global_shape()](const Tensor& gradient) {
    const Tensor sum =
        Tensor::Full(all, AccumulatorDType(gradient.dtype()), 0, MemoryClass::kCommunication);
    const Tensor rows = sum.Narrowed(0, mine.begin, mine.size());
    rows.CopyFrom(gradient);
    const View view = sum.view();
    group.AllReduce(std::span(&view, 1));
    gradient.CopyFrom(rows);
  });
}

}  // namespace

AxisCut CutTransformer(int ranks, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t mlp,
                       int64_t vocab) {
  if (ranks > heads)
    SHOAL_FAIL(ErrorKind::kConfig, "mesh",
               "mesh.tp {} gives some ranks none of the model's {} heads: set it to {} at most",
               ranks, heads, heads);
  AxisCut cut;
  cut.heads = heads;
  cut.kv_heads = kv_heads;
  cut.ranges["heads"] = Deal(heads, ranks, head_dim);
  cut.ranges["mlp"] = Deal(mlp, ranks);
  cut.ranges["vocab"] =
      Deal(Mutated(Mutation::kVocabularyRemainderDropped) ? vocab / ranks * ranks : vocab, ranks);
  const int64_t group = heads / kv_heads;
  for (const Range& q : Deal(heads, ranks))
    cut.ranges["kv_heads"].push_back(
        {q.begin / group * head_dim, (q.end + group - 1) / group * head_dim});
  return cut;
}

std::string DescribeCut(Module& root, const AxisCut& cut, int ranks) {
  std::string text;
  for (const auto& p : root.Parameters()) {
    text += fmt::format("{} {}", p->name(), p->global_shape().ToString());
    for (int d = 0; d < p->global_shape().rank(); ++d) {
      const auto found = cut.ranges.find(p->axes()[static_cast<size_t>(d)]);
      if (found == cut.ranges.end()) continue;
      text += fmt::format("  {}:", found->first);
      for (int r = 0; r < ranks; ++r) {
        const Range& range = found->second[static_cast<size_t>(r)];
        text += fmt::format(" [{}, {})", range.begin, range.end);
      }
    }
    text += '\n';
  }
  return text;
}

std::function<void(int64_t)> ApplyTensorParallel(Module& root, const AxisCut& cut,
                                                 Communicator& group, bool sequence_parallel) {
  if (group.size() == 1) return [](int64_t) {};
  const auto region = std::make_shared<Region>(group, sequence_parallel);
  const auto r = static_cast<size_t>(group.rank());
  const auto range_of = [&](const std::string& axis) {
    const auto found = cut.ranges.find(axis);
    return found == cut.ranges.end() ? nullptr : &found->second;
  };
  const auto place = [&](Parameter& p, AxisPlacement placement) {
    if (group.axis()) p.Place(*group.axis(), placement);
  };
  for (const auto& p : root.Parameters()) {
    bool whole = true;
    for (int d = 0; d < p->shape().rank(); ++d) {
      const std::vector<Range>* ranges = range_of(p->axes()[static_cast<size_t>(d)]);
      if (ranges == nullptr) continue;
      whole = false;
      place(*p, AxisPlacement::Sharded(d));
      p->TakeSlice(d, (*ranges)[r].begin, (*ranges)[r].size());
      if (d == 0) ShareOverlap(*p, *ranges, group);
    }
    if (!whole) continue;
    // All hold it, and it counts once. Its gradient is that of all tokens, or of this rank's.
    if (r != 0) p->set_owned(0, 0);
    if (!sequence_parallel) continue;
    place(*p, {AxisPlacement::kReplicated});
    SumGradient(*p, group);
  }
  struct Change {
    std::string path;
    std::shared_ptr<Module> module;
  };
  std::vector<Change> changes;
  root.Walk([&](const std::string& path, Module& module) {
    const auto replace = [&](std::shared_ptr<Module> by) {
      changes.push_back({path, std::move(by)});
    };
    if (const auto* linear = dynamic_cast<const Linear*>(&module)) {
      const auto& axes = linear->weight()->axes();
      if (range_of(axes[0]) != nullptr) {
        replace(std::make_shared<ColumnLinear>(*linear, region));
      } else if (range_of(axes[1]) != nullptr) {
        if (linear->bias()) {
          // It is added once: the whole is the first rank's, and nothing is the others'.
          Parameter& bias = *linear->bias();
          place(bias, {AxisPlacement::kPartial});
          bias.set_gradient_sum(nullptr);
          if (r != 0 && !Mutated(Mutation::kBiasOnEveryRank)) bias.TakeSlice(0, 0, 0);
        }
        replace(std::make_shared<RowLinear>(*linear, region));
      }
    } else if (const auto* embedding = dynamic_cast<const Embedding*>(&module)) {
      if (range_of(embedding->weight()->axes()[0]) != nullptr) {
        replace(std::make_shared<ShardedEmbedding>(*embedding, region));
      } else if (sequence_parallel) {
        replace(std::make_shared<RowsEmbedding>(*embedding, region));
      }
    } else if (const auto* dropout = dynamic_cast<const Dropout*>(&module)) {
      if (sequence_parallel) replace(std::make_shared<RowsDropout>(*dropout, region));
    } else if (dynamic_cast<const LmLoss*>(&module) != nullptr) {
      replace(std::make_shared<ShardedLmLoss>(region));
    } else if (auto* attention = dynamic_cast<InnerAttention*>(&module)) {
      const int64_t per_kv = cut.heads / cut.kv_heads;
      const Range q = Deal(cut.heads, group.size())[r];
      attention->set_first_head(q.begin);
      std::vector<int64_t> kv_of_query;
      for (int64_t h = q.begin; h < q.end; ++h)
        kv_of_query.push_back(h / per_kv - q.begin / per_kv);
      const int64_t kv = kv_of_query.back() + 1;
      bool even = q.size() % kv == 0;
      for (int64_t i = 0; even && i < q.size(); ++i)
        even = kv_of_query[static_cast<size_t>(i)] == i / (q.size() / kv);
      if (!even) replace(std::make_shared<MappedAttention>(kv_of_query, attention->dropout()));
    }
  });
  for (Change& change : changes) root.Replace(change.path, std::move(change.module));
  return [region](int64_t tokens) { region->Begin(tokens); };
}

}  // namespace shoal
