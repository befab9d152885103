// Forward attention: for each block of queries an online softmax over tiles of keys (Dao, arXiv
// 2307.08691, algorithm 1), the tile's scores transposed.
#include "kernels/cpu/attention_units.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_forward.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/attention_dropout-inl.h"
#include "kernels/cpu/attention_tiles-inl.h"

HWY_BEFORE_NAMESPACE();
#if SHOAL_ATTENTION_BF16_DOT
#pragma GCC target("avx512bf16")
#endif
namespace shoal::kernels::cpu::HWY_NAMESPACE {

template <class P>
class Forward {
  using In = typename P::In;
  using Acc = typename P::Acc;
  using Word = typename P::Word;
  using D = typename P::D;
  using V = typename P::V;
  static constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();

 public:
  // `keys` is how many keys are packed at a time.
  Forward(const AttentionProblem& a, int64_t keys, char* scratch)
      : a_(a), padded_(a.padded_head()), words_(padded_ / P::kPair) {
    Carver c(scratch);
    const int64_t rows = RoundUp(keys, kGroup) + kGroup;
    keys_ = c.Take<Word>(rows * words_);
    values_ = c.Take<Word>(rows * words_);
    staging_ = c.Take<Word>(std::max(P::kPair == 2 ? kKeyTile : 0, kQueryBlock) * words_);
    transposed_ = c.Take<Word>(words_ * kQueryBlock);
    scores_ = c.Take<Acc>(kKeyTile * kQueryBlock);
    if constexpr (P::kPair == 2)
      probabilities_ = c.Take<Word>(kKeyTile / P::kPair * kQueryBlock);
    else
      probabilities_ = scores_;
    out_ = c.Take<Acc>(kQueryBlock * padded_);
    max_ = c.Take<Acc>(kQueryBlock);
    sum_ = c.Take<Acc>(kQueryBlock);
    rescale_ = c.Take<Acc>(kQueryBlock);
    masks_ = c.Take<QueryMasks<SignedOf>>(1);
    if (a.drops()) dropout_ = c.Take<DropoutMask<D>>(1);
    used_ = c.used();
  }
  int64_t used() const { return used_; }

  void Run(const AttentionUnit& u) {
    const int64_t heads = u.head_end - u.head_begin, queries = u.query_end - u.query_begin;
    if (heads > 1 && u.streamed) {
      a_.fold = heads;
      return Block(u, u.head_begin, 0, queries * heads);
    }
    if (!u.streamed) {
      first_key_ = a_.KeysBegin(u.query_begin);
      const int64_t end = a_.KeysEnd(u.query_end - 1);
      if (first_key_ < end) PackKeys(u, end);
    }
    for (int64_t n = u.head_begin; n < u.head_end; ++n)
      for (int64_t i = u.query_begin; i < u.query_end; i += kQueryBlock)
        Block(u, n, i, std::min(kQueryBlock, u.query_end - i));
  }

 private:
  using SignedOf = hwy::MakeSigned<Acc>;

  void PackKeys(const AttentionUnit& u, int64_t end) {
    const int64_t rows = end - first_key_, count = std::min(end, a_.keys) - first_key_;
    PackRows<P>(a_.k, u.batch, u.kv_head, first_key_, count, rows, padded_, keys_);
    if constexpr (P::kPair == 2) {
      for (int64_t j = 0; j < rows; j += kKeyTile) {
        const int64_t n = std::min(kKeyTile, rows - j);
        PackRows<P>(a_.v, u.batch, u.kv_head, first_key_ + j, std::min(n, count - j), n, padded_,
                    staging_);
        PackPairs(staging_, n, padded_, values_ + j * words_);
      }
    } else {
      PackRows<P>(a_.v, u.batch, u.kv_head, first_key_, count, rows, padded_, values_);
    }
  }

  // Rows [query, query + queries) of head n, or of the heads from n on that are folded into them.
  void Block(const AttentionUnit& u, int64_t n, int64_t query, int64_t queries) {
    const D d;
    const int64_t b = u.batch, padded_queries = RoundUp(queries, kHeadMultiple);
    if (a_.fold == 1) {
      PackRows<P>(a_.q, b, n, query, queries, padded_queries, padded_, staging_);
    } else {
      std::memset(staging_, 0, padded_queries * words_ * sizeof(Word));
      for (int64_t r = 0; r < queries; ++r)
        PackRow<P>(RowOf<In>(a_.q, b, r / a_.fold, n + r % a_.fold), a_.head_dim, padded_,
                   staging_ + r * words_);
    }
    TransposeWords(staging_, words_, padded_queries, words_, transposed_, kQueryBlock);
    std::fill_n(out_, RoundUp(queries, kGroup) * padded_, Acc(0));
    std::fill_n(max_, kQueryBlock, -kInfinity);
    std::fill_n(sum_, kQueryBlock, Acc(0));
    std::fill_n(rescale_, kQueryBlock, Acc(0));
    if (a_.documents()) masks_->SetDocuments(a_, b, query, queries);
    if (a_.drops()) dropout_->SetBlock(a_, b, n, query);
    const auto scale = static_cast<Acc>(a_.options.scale * ScoreUnit<Acc>());
    const int64_t end = a_.KeysEnd(query + queries - 1);
    for (int64_t j = RoundDown(a_.KeysBegin(query), kKeyTile); j < end; j += kKeyTile) {
      const Tile t = MakeTile(a_, b, query, queries, j, std::min(j + kKeyTile, end));
      if (t.rows == 0) continue;
      if (u.streamed) {
        first_key_ = t.key;
        PackKeys(u, t.key + t.rows);
      }
      const int64_t offset = (t.key - first_key_) * words_;
      ScoreTile<P>(a_, t, keys_ + offset, transposed_, scale, scores_);
      if (t.masked) masks_->SetTile(a_, t);
      for (int64_t v = 0; v < queries; v += hn::Lanes(d))
        a_.drops() ? Softmax<true>(t, b, v) : Softmax<false>(t, b, v);
      QueryProduct<P, Into::kRescaled>(a_, t, probabilities_, values_ + offset, out_, rescale_);
    }
    Write(b, n, query, queries);
  }

  // Scores of the vector of queries at v to probabilities relative to the running maximum. Those
  // that are dropped count in the sum alone.
  template <bool kDrop>
  void Softmax(const Tile& t, int64_t b, int64_t v) {
    const D d;
    const auto rows = RowsFor(a_, t, v, hn::Lanes(d));
    const auto infinity = hn::Set(d, -kInfinity);
    Acc* s = scores_ + v;
    const V old = hn::Load(d, max_ + v);
    V m0 = old, m1 = infinity;
    const auto mask = [&](int64_t begin, int64_t end) HWY_ATTR {
      for (int64_t r = begin; r < end; ++r) {
        Acc* p = s + r * kQueryBlock;
        const V x = hn::IfThenElse(Sees(d, a_, t, b, *masks_, v, r), hn::Load(d, p), infinity);
        hn::Store(x, d, p);
        m0 = hn::Max(m0, x);
      }
    };
    mask(rows.begin, rows.full_begin);
    for (int64_t r = rows.full_begin; r < rows.full_end; r += 2) {
      m0 = hn::Max(m0, hn::Load(d, s + r * kQueryBlock));
      m1 = hn::Max(m1, hn::Load(d, s + (r + 1) * kQueryBlock));
    }
    mask(rows.full_end, rows.end);
    const V top = hn::Max(m0, m1);
    // A query that has seen nothing yet: any finite value will do.
    const V base = hn::IfThenElse(hn::Eq(top, infinity), hn::Zero(d), top);
    const V rescale = Power(d, hn::Sub(old, base));
    hn::Store(top, d, max_ + v);
    hn::Store(rescale, d, rescale_ + v);

    V l0 = hn::Mul(hn::Load(d, sum_ + v), rescale), l1 = hn::Zero(d);
    if constexpr (kDrop) dropout_->SetVector(v);
    const auto store = [&](int64_t r, V p0, V p1) HWY_ATTR {
      if constexpr (P::kPair == 2) {
        P::StorePairs(p0, p1, probabilities_ + r / 2 * kQueryBlock + v);
      } else {
        hn::Store(p0, d, s + r * kQueryBlock);
        hn::Store(p1, d, s + (r + 1) * kQueryBlock);
      }
    };
    const auto zero = [&](int64_t begin, int64_t end) HWY_ATTR {
      for (int64_t r = begin; r < end; r += 2) store(r, hn::Zero(d), hn::Zero(d));
    };
    const auto power = [&](int64_t begin, int64_t end) HWY_ATTR {
      for (int64_t r = begin; r < end; r += 2) {
        const V x0 = hn::Load(d, s + r * kQueryBlock), x1 = hn::Load(d, s + (r + 1) * kQueryBlock);
        V p0 = Power(d, hn::Sub(x0, base)), p1 = Power(d, hn::Sub(x1, base));
        l0 = hn::Add(l0, p0);
        l1 = hn::Add(l1, p1);
        if constexpr (kDrop) {
          p0 = hn::IfThenElseZero(dropout_->Keeps(d, t.key + r), p0);
          p1 = hn::IfThenElseZero(dropout_->Keeps(d, t.key + r + 1), p1);
        }
        store(r, p0, p1);
      }
    };
    zero(rows.zero_begin, rows.begin);
    power(rows.begin, rows.end);
    zero(rows.end, rows.zero_end);
    hn::Store(hn::Add(l0, l1), d, sum_ + v);
  }

  void Write(int64_t b, int64_t n, int64_t query, int64_t queries) {
    const D d;
    Acc* lse = a_.lse.as<Acc>();
    const auto scale = static_cast<Acc>(a_.options.dropout.Scale());
    for (int64_t v = 0; v < queries; v += hn::Lanes(d)) {
      const V sum = hn::Load(d, sum_ + v);
      const auto nothing = hn::Eq(sum, hn::Zero(d));
      V log = hn::MulAdd(hn::Load(d, max_ + v), hn::Set(d, ScoreLog<Acc>()), hn::Log(d, sum));
      log = hn::IfThenElse(hn::IsNaN(sum), sum, log);
      hn::Store(hn::IfThenElse(nothing, hn::Set(d, -kInfinity), log), d, max_ + v);
      hn::Store(hn::IfThenZeroElse(nothing, hn::Div(hn::Set(d, scale), sum)), d, rescale_ + v);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t t = a_.QueryOf(query + i), head = n + (query + i) % a_.fold;
      lse[(b * a_.heads + head) * a_.queries + t] = max_[i];
      const Acc* row = out_ + i * padded_;
      if (a_.out.dtype == a_.q.dtype)
        WriteRow(row, rescale_[i], a_.head_dim, MutableRowOf<In>(a_.out, b, t, head));
      else
        WriteRow(row, rescale_[i], a_.head_dim, MutableRowOf<Acc>(a_.out, b, t, head));
    }
  }

  AttentionProblem a_;
  const int64_t padded_, words_;  // of a row: numbers, words
  int64_t used_ = 0, first_key_ = 0;
  Word* keys_;        // [keys, words] from first_key_
  Word* values_;      // [keys / kPair, padded]
  Word* staging_;     // rows as they come
  Word* transposed_;  // Q^T [words, kQueryBlock]
  Acc* scores_;       // S^T [kKeyTile, kQueryBlock]
  Word*
      probabilities_;  // P^T [kKeyTile / kPair, kQueryBlock]; the same memory if words are numbers
  Acc* out_;           // [kQueryBlock, padded]
  Acc *max_, *sum_, *rescale_;
  QueryMasks<SignedOf>* masks_;
  DropoutMask<D>* dropout_ = nullptr;
};

int64_t ForwardScratch(const AttentionProblem& a, bool pairs, int64_t keys) {
  return VisitPath(a, pairs, [&](auto path) {
    return Forward<typename decltype(path)::type>(a, keys, nullptr).used();
  });
}
void ForwardUnit(const AttentionProblem& a, bool pairs, int64_t keys, const AttentionUnit& u,
                 char* scratch) {
  VisitPath(a, pairs, [&](auto path) {
    Forward<typename decltype(path)::type>(a, keys, scratch).Run(u);
    return 0;
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
HWY_EXPORT(ForwardScratch);
HWY_EXPORT(ForwardUnit);

int64_t AttentionScratch(const AttentionProblem& a, bool pairs, int64_t keys) {
  return HWY_DYNAMIC_DISPATCH(ForwardScratch)(a, pairs, keys);
}
void RunAttentionUnit(const AttentionProblem& a, bool pairs, int64_t keys, const AttentionUnit& u,
                      char* scratch) {
  HWY_DYNAMIC_DISPATCH(ForwardUnit)(a, pairs, keys, u, scratch);
}
}  // namespace shoal::kernels::cpu
#endif
