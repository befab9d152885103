// Sequence-parallel attention against attention on one rank: what the tests of it share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <mutex>
#include <optional>
#include <random>

#include "core/ops.h"
#include "parallel/sequence_attention.h"

namespace shoal::sequence_testing {

using Kind = SequenceKind;
using Layout = SequenceLayoutKind;

enum class Mask { kFull, kCausal, kWindow, kPacked };
constexpr Mask kMasks[] = {Mask::kFull, Mask::kCausal, Mask::kWindow, Mask::kPacked};
constexpr Layout kLayouts[] = {Layout::kContiguous, Layout::kZigzag, Layout::kStriped};
constexpr std::pair<int64_t, int64_t> kHeads[] = {{8, 8}, {8, 2}, {8, 1}, {6, 3}};
constexpr int64_t kHeadDims[] = {16, 64, 80, 128};

// That these ranks can be in: groups of a hybrid have equal sizes.
inline std::vector<Kind> KindsOf(int ranks) {
  std::vector<Kind> kinds;
  for (int k = 0; k < kSequenceKinds; ++k)
    if (static_cast<Kind>(k) != Kind::kHybrid || SequenceGroupSizes(ranks).size() > 2)
      kinds.push_back(static_cast<Kind>(k));
  return kinds;
}

// The same, and the token rings both ways.
inline std::vector<std::pair<Kind, bool>> WaysOf(int ranks) {
  std::vector<std::pair<Kind, bool>> ways;
  for (const Kind kind : KindsOf(ranks)) {
    ways.emplace_back(kind, false);
    if (CanGoBothWays(kind)) ways.emplace_back(kind, true);
  }
  return ways;
}

struct Case {
  Kind kind;
  Layout layout;
  Mask mask;
  int64_t tokens, heads, kv_heads, head_dim, batch;
  double logits = 1;  // about the largest
  std::optional<Kind> backward = {};
  DType dtype = DType::kF64;
  bool wide_results = true;
  int ulysses = 0;
  std::optional<bool> both_ways = {};

  bool causal() const { return mask != Mask::kFull; }
  int64_t window() const { return mask == Mask::kWindow ? 1 + tokens / 5 : 0; }
  std::string Text(int ranks) const {
    return fmt::format("P {} {}{} {} {} mask {} S {} heads {}/{} H {} B {}", ranks, Name(kind),
                       both_ways.value_or(false) ? " both ways" : "", ulysses, Name(layout),
                       static_cast<int>(mask), tokens, heads, kv_heads, head_dim, batch);
  }
};

inline Tensor Random(const Dims& shape, double range, DType dtype, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(-range, range);
  std::vector<double> values(static_cast<size_t>(shape.numel()));
  for (double& v : values) v = uniform(random);
  return Tensor::From(values, shape).To(dtype);
}

// Documents of 1 to 12 tokens, others in each sequence.
inline std::vector<int32_t> PackedIds(int64_t batch, int64_t tokens) {
  std::vector<int32_t> ids;
  for (int64_t b = 0; b < batch; ++b) {
    std::mt19937 random(static_cast<uint32_t>(b + 7));
    int32_t id = 0;
    for (int64_t t = 0, left = 0; t < tokens; ++t, --left) {
      if (left == 0) ++id, left = 1 + static_cast<int64_t>(random() % 12);
      ids.push_back(id);
    }
  }
  return ids;
}

// The whole: what goes in and what must come out.
struct Whole {
  Tensor q, k, v, dout, out, dq, dk, dv, documents;
};

inline std::shared_ptr<Leaf> MakeLeaf(const Tensor& x) {
  auto leaf = std::make_shared<Leaf>(x.shape(), x.dtype());
  x.set_node(leaf);
  return leaf;
}

inline Whole MakeWhole(const Case& c) {
  Whole w;
  const Dims q{c.batch, c.tokens, c.heads, c.head_dim},
      k{c.batch, c.tokens, c.kv_heads, c.head_dim};
  const double range = std::sqrt(c.logits);
  w.q = Random(q, range, c.dtype, 1);
  w.k = Random(k, range, c.dtype, 2);
  w.v = Random(k, 1, c.dtype, 3);
  w.dout = Random(q, 1, c.dtype, 4);
  if (c.mask == Mask::kPacked)
    w.documents = Tensor::From(PackedIds(c.batch, c.tokens), {c.batch, c.tokens});
  // In double, from the values that the ranks have.
  const Tensor q64 = w.q.To(DType::kF64), k64 = w.k.To(DType::kF64), v64 = w.v.To(DType::kF64);
  const auto lq = MakeLeaf(q64), lk = MakeLeaf(k64), lv = MakeLeaf(v64);
  const kernels::AttentionOptions options = {1 / std::sqrt(static_cast<double>(c.head_dim)),
                                             c.causal(), c.window(), 0};
  w.out = ops::Attention(q64, k64, v64, w.documents, w.documents, options).out;
  Backward(w.out, w.dout.To(DType::kF64));
  w.out = w.out.Detached();
  w.dq = lq->grad, w.dk = lk->grad, w.dv = lv->grad;
  return w;
}

// The rows of dimension 1 that `rank` has.
inline Tensor Mine(const Tensor& whole, const SequenceLayout& layout, int rank) {
  Dims shape = whole.shape();
  shape[1] = layout.Rows(rank);
  Tensor rows = Tensor::Empty(shape, whole.dtype());
  int64_t row = 0;
  for (const int64_t token : layout.Tokens(rank))
    rows.Narrowed(1, row++, 1).CopyFrom(whole.Narrowed(1, token, 1));
  return rows;
}

// Squares of differences and of what is wanted: out, dq, dk, dv.
struct Errors {
  double difference[4] = {}, wanted[4] = {};
  bool finite = true;
  void Add(int i, const Tensor& got, const Tensor& want) {
    const std::vector<double> g = got.ToVector(), w = want.ToVector();
    ASSERT_EQ(g.size(), w.size());
    for (size_t j = 0; j < g.size(); ++j) {
      difference[i] += (g[j] - w[j]) * (g[j] - w[j]);
      wanted[i] += w[j] * w[j];
      finite = finite && std::isfinite(g[j]);
    }
  }
  double Relative(int i) const {
    return std::sqrt(difference[i] / (wanted[i] > 0 ? wanted[i] : 1));
  }
  double Worst() const {
    if (!finite) return std::numeric_limits<double>::infinity();
    double worst = 0;
    for (int i = 0; i < 4; ++i) worst = std::max(worst, Relative(i));
    return worst;
  }
};

// Runs the case on this rank, and checks the bytes that it sends.
inline void RunRank(const Case& c, const Whole& w, Communicator& ranks, Errors& errors,
                    std::mutex& mutex) {
  SequenceOptions options;
  options.schedule = c.kind;
  options.backward = c.backward;
  options.ulysses = c.ulysses;
  options.both_ways = c.both_ways;
  options.layout = c.layout;
  options.causal = c.causal();
  options.window = c.window();
  options.wide_results = c.wide_results;
  const auto group = std::make_shared<SequenceGroup>(options, ranks);
  SequenceAttention attention(group);
  const SequenceLayout layout(c.layout, c.tokens, ranks.size());
  const int rank = ranks.rank();
  const Tensor q = Mine(w.q, layout, rank), k = Mine(w.k, layout, rank),
               v = Mine(w.v, layout, rank);
  const auto lq = MakeLeaf(q), lk = MakeLeaf(k), lv = MakeLeaf(v);
  SequenceInfo info;
  if (w.documents.defined()) info.documents = Mine(w.documents, layout, rank);
  const Tensor out = attention.Forward(q, k, v, info);
  const auto plan = group->PlanFor(q, k, info);
  const SequenceWidths widths = WidthsOf(c.batch, c.head_dim, c.dtype, {1, c.wide_results});
  EXPECT_EQ(group->wire_bytes(), CountTraffic(plan->forward, widths).Sent(rank))
      << c.Text(ranks.size());
  const int64_t before = group->wire_bytes();
  Backward(out, Mine(w.dout, layout, rank));
  EXPECT_EQ(group->wire_bytes() - before, CountTraffic(plan->backward, widths).Sent(rank))
      << c.Text(ranks.size());
  const std::lock_guard lock(mutex);
  errors.Add(0, out.Detached(), Mine(w.out, layout, rank));
  errors.Add(1, lq->grad, Mine(w.dq, layout, rank));
  errors.Add(2, lk->grad, Mine(w.dk, layout, rank));
  errors.Add(3, lv->grad, Mine(w.dv, layout, rank));
}

inline Errors RunCase(const Case& c, const Whole& whole, int ranks) {
  Errors errors;
  std::mutex mutex;
  RunThreadRanks(ranks, 1, [&](Communicator& comm) { RunRank(c, whole, comm, errors, mutex); });
  return errors;
}
inline Errors RunCase(const Case& c, int ranks) { return RunCase(c, MakeWhole(c), ranks); }

}  // namespace shoal::sequence_testing
