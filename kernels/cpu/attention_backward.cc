// Backward attention: probabilities are recomputed from lse (Dao, arXiv 2307.08691, algorithm 2),
// a block of queries at a time over tiles of keys. dQ of the block and dK, dV of the unit's keys
// are sums in Acc, in ascending order of tiles, heads and blocks.
#include "kernels/cpu/attention_units.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_backward.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/attention_dropout-inl.h"
#include "kernels/cpu/attention_tiles-inl.h"

HWY_BEFORE_NAMESPACE();
#if SHOAL_ATTENTION_BF16_DOT
#pragma GCC target("avx512bf16")
#endif
namespace shoal::kernels::cpu::HWY_NAMESPACE {

template <class P>
class Backward {
  using In = typename P::In;
  using Acc = typename P::Acc;
  using Word = typename P::Word;
  using D = typename P::D;
  using V = typename P::V;
  static constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  static constexpr bool kPairs = P::kPair == 2;

 public:
  Backward(const AttentionProblem& a, int64_t keys, char* scratch)
      : a_(a), padded_(a.padded_head()), words_(padded_ / P::kPair) {
    Carver c(scratch);
    const int64_t rows = RoundUp(keys, kGroup) + kGroup;
    key_rows_ = c.Take<Word>(rows * words_);
    value_rows_ = c.Take<Word>(rows * words_);
    key_columns_ = kPairs ? c.Take<Word>(rows * words_) : key_rows_;
    dk_ = c.Take<Acc>(rows * padded_);
    dv_ = c.Take<Acc>(rows * padded_);
    q_rows_ = c.Take<Word>(kQueryBlock * words_);
    dout_rows_ = c.Take<Word>(kQueryBlock * words_);
    q_transposed_ = c.Take<Word>(kQueryBlock * words_);
    dout_transposed_ = c.Take<Word>(kQueryBlock * words_);
    q_columns_ = kPairs ? c.Take<Word>(kQueryBlock * words_) : q_rows_;
    dout_columns_ = kPairs ? c.Take<Word>(kQueryBlock * words_) : dout_rows_;
    scores_ = c.Take<Acc>(kKeyTile * kQueryBlock);
    dp_ = c.Take<Acc>(kKeyTile * kQueryBlock);
    if constexpr (kPairs) {
      p_rows_ = c.Take<Word>(kKeyTile * kQueryBlock / 2);
      ds_rows_ = c.Take<Word>(kKeyTile * kQueryBlock / 2);
      ds_columns_ = c.Take<Word>(kKeyTile * kQueryBlock / 2);
    } else {
      p_rows_ = scores_;
      ds_rows_ = ds_columns_ = dp_;
    }
    dq_ = c.Take<Acc>(kQueryBlock * padded_);
    lse_ = c.Take<Acc>(kQueryBlock);
    delta_ = c.Take<Acc>(kQueryBlock);
    masks_ = c.Take<QueryMasks<SignedOf>>(1);
    if (a.drops()) dropout_ = c.Take<DropoutMask<D>>(1);
    used_ = c.used();
  }
  int64_t used() const { return used_; }

  void Run(const AttentionUnit& u) {
    // Packs what the unit can touch; dK and dV cover its whole range.
    first_key_ = std::max(u.key_begin, RoundDown(a_.KeysBegin(u.query_begin), kKeyTile));
    const int64_t end = std::min(RoundUp(u.key_end, kGroup), a_.KeysEnd(u.query_end - 1));
    if (first_key_ < end) {
      PackKeys(u, end);
      for (int64_t n = u.head_begin; n < u.head_end; ++n)
        for (int64_t i = u.query_begin; i < u.query_end; i += kQueryBlock)
          Block(u, n, i, std::min(kQueryBlock, u.query_end - i), end);
    } else if (u.dq && !a_.add) {
      std::fill_n(dq_, padded_, Acc(0));
      for (int64_t n = u.head_begin; n < u.head_end; ++n)
        for (int64_t i = u.query_begin; i < u.query_end; ++i)
          GiveRow<In>(a_, dq_, Acc(1), a_.dq, u.batch, i, n);
    }
    if (u.dkv) WriteKeys(u, end);
  }

 private:
  using SignedOf = hwy::MakeSigned<Acc>;

  void PackKeys(const AttentionUnit& u, int64_t end) {
    const int64_t rows = end - first_key_, count = std::min(end, a_.keys) - first_key_;
    PackRows<P>(a_.k, u.batch, u.kv_head, first_key_, count, rows, padded_, key_rows_);
    PackRows<P>(a_.v, u.batch, u.kv_head, first_key_, count, rows, padded_, value_rows_);
    if constexpr (kPairs) {
      if (u.dq) PackPairs(key_rows_, rows, padded_, key_columns_);
    }
    if (u.dkv) {
      std::fill_n(dk_, rows * padded_, Acc(0));
      std::fill_n(dv_, rows * padded_, Acc(0));
    }
  }

  void Block(const AttentionUnit& u, int64_t n, int64_t query, int64_t queries, int64_t key_end) {
    const D d;
    const int64_t b = u.batch;
    const int64_t end = std::min(key_end, a_.KeysEnd(query + queries - 1));
    const int64_t begin = std::max(first_key_, RoundDown(a_.KeysBegin(query), kKeyTile));
    if (begin >= end && !u.dq) return;
    PackQueries(b, n, query, queries);
    std::fill_n(dq_, RoundUp(queries, kGroup) * padded_, Acc(0));
    if (a_.documents()) masks_->SetDocuments(a_, b, query, queries);
    if (a_.drops()) dropout_->SetBlock(a_, b, n, query);
    const auto scale = static_cast<Acc>(a_.options.scale * ScoreUnit<Acc>());
    for (int64_t j = begin; j < end; j += kKeyTile) {
      const Tile t = MakeTile(a_, b, query, queries, j, std::min(j + kKeyTile, end));
      if (t.rows == 0) continue;
      const int64_t row = t.key - first_key_;
      ScoreTile<P>(a_, t, key_rows_ + row * words_, q_transposed_, scale, scores_);
      ScoreTile<P>(a_, t, value_rows_ + row * words_, dout_transposed_, Acc(1), dp_);
      if (t.masked) masks_->SetTile(a_, t);
      for (int64_t v = 0; v < queries; v += hn::Lanes(d))
        a_.drops() ? Differentiate<true>(t, b, v) : Differentiate<false>(t, b, v);
      if (u.dkv) {
        KeyProduct<P>(a_, t, p_rows_, dout_columns_, dv_ + row * padded_);
        KeyProduct<P>(a_, t, ds_rows_, q_columns_, dk_ + row * padded_);
      }
      if (u.dq)
        QueryProduct<P, Into::kAdded>(a_, t, ds_columns_, key_columns_ + row * words_, dq_,
                                      nullptr);
    }
    if (u.dq)
      for (int64_t i = 0; i < queries; ++i)
        GiveRow<In>(a_, dq_ + i * padded_, static_cast<Acc>(a_.options.scale), a_.dq, b, query + i,
                    n);
  }

  void PackQueries(int64_t b, int64_t n, int64_t query, int64_t queries) {
    const int64_t rows = RoundUp(queries, kHeadMultiple);
    PackRows<P>(a_.q, b, n, query, queries, rows, padded_, q_rows_);
    PackRows<P>(a_.dout, b, n, query, queries, rows, padded_, dout_rows_);
    TransposeWords(q_rows_, words_, rows, words_, q_transposed_, kQueryBlock);
    TransposeWords(dout_rows_, words_, rows, words_, dout_transposed_, kQueryBlock);
    if constexpr (kPairs) {
      PackPairs(q_rows_, rows, padded_, q_columns_);
      PackPairs(dout_rows_, rows, padded_, dout_columns_);
    }
    const int64_t first = (b * a_.heads + n) * a_.queries + query;
    const Acc* lse = a_.lse.as<const Acc>() + first;
    const Acc* delta = a_.delta.as<const Acc>() + first;
    // A query that sees nothing, and those beyond the last, get probability 0 everywhere.
    for (int64_t i = 0; i < kQueryBlock; ++i)
      lse_[i] = i < queries && lse[i] != -kInfinity ? static_cast<Acc>(lse[i] * ScoreUnit<Acc>())
                                                    : kInfinity;
    for (int64_t i = 0; i < kQueryBlock; ++i) delta_[i] = i < queries ? delta[i] : Acc(0);
  }

  // P = exp(S - lse) and dS = P (dP - delta) for the vector of queries at v. With dropout dP is
  // that of what stays, scaled, and P is what stays of it; dV has the scale.
  template <bool kDrop>
  void Differentiate(const Tile& t, int64_t b, int64_t v) {
    const D d;
    const auto rows = RowsFor(a_, t, v, hn::Lanes(d));
    const V lse = hn::Load(d, lse_ + v), delta = hn::Load(d, delta_ + v);
    Acc* s = scores_ + v;
    Acc* dp = dp_ + v;
    if constexpr (kDrop) dropout_->SetVector(v);
    [[maybe_unused]] const V dropout_scale =
        hn::Set(d, static_cast<Acc>(a_.options.dropout.Scale()));
    const auto store = [&](int64_t r, V p0, V p1, V ds0, V ds1) HWY_ATTR {
      if constexpr (kPairs) {
        auto* p = reinterpret_cast<BF16*>(p_rows_) + r * kQueryBlock + v;
        auto* ds = reinterpret_cast<BF16*>(ds_rows_) + r * kQueryBlock + v;
        P::StoreRow(p0, p);
        P::StoreRow(p1, p + kQueryBlock);
        P::StoreRow(ds0, ds);
        P::StoreRow(ds1, ds + kQueryBlock);
        P::StorePairs(ds0, ds1, ds_columns_ + r / 2 * kQueryBlock + v);
      } else {
        hn::Store(p0, d, s + r * kQueryBlock);
        hn::Store(p1, d, s + (r + 1) * kQueryBlock);
        hn::Store(ds0, d, dp + r * kQueryBlock);
        hn::Store(ds1, d, dp + (r + 1) * kQueryBlock);
      }
    };
    const auto zero = [&](int64_t begin, int64_t end) HWY_ATTR {
      const V z = hn::Zero(d);
      for (int64_t r = begin; r < end; r += 2) store(r, z, z, z, z);
    };
    const auto compute = [&](int64_t begin, int64_t end, auto masked) HWY_ATTR {
      for (int64_t r = begin; r < end; r += 2) {
        V p[2], ds[2];
        for (int64_t k = 0; k < 2; ++k) {
          const int64_t at = (r + k) * kQueryBlock;
          p[k] = Power(d, hn::Sub(hn::Load(d, s + at), lse));
          V dp_row = hn::Load(d, dp + at);
          if constexpr (kDrop) {
            const auto keeps = dropout_->Keeps(d, t.key + r + k);
            dp_row = hn::IfThenElseZero(keeps, hn::Mul(dp_row, dropout_scale));
            ds[k] = hn::Mul(p[k], hn::Sub(dp_row, delta));
            p[k] = hn::IfThenElseZero(keeps, p[k]);
          } else {
            ds[k] = hn::Mul(p[k], hn::Sub(dp_row, delta));
          }
          if constexpr (masked) {
            const auto sees = Sees(d, a_, t, b, *masks_, v, r + k);
            p[k] = hn::IfThenElseZero(sees, p[k]);
            ds[k] = hn::IfThenElseZero(sees, ds[k]);
          }
        }
        store(r, p[0], p[1], ds[0], ds[1]);
      }
    };
    zero(rows.zero_begin, rows.begin);
    compute(rows.begin, rows.full_begin, std::true_type());
    compute(rows.full_begin, rows.full_end, std::false_type());
    compute(rows.full_end, rows.end, std::true_type());
    zero(rows.end, rows.zero_end);
  }

  void WriteKeys(const AttentionUnit& u, int64_t end) {
    std::fill_n(dq_, padded_, Acc(0));
    const auto scale = static_cast<Acc>(a_.options.scale);
    const auto of_values = static_cast<Acc>(a_.options.dropout.Scale());
    for (int64_t j = u.key_begin; j < u.key_end; ++j) {
      const bool touched = j >= first_key_ && j < end;
      const int64_t at = (j - first_key_) * padded_;
      if (a_.add && !touched) continue;
      GiveRow<In>(a_, touched ? dk_ + at : dq_, scale, a_.dk, u.batch, j, u.kv_head);
      GiveRow<In>(a_, touched ? dv_ + at : dq_, of_values, a_.dv, u.batch, j, u.kv_head);
    }
  }

  const AttentionProblem& a_;
  const int64_t padded_, words_;  // of a row: numbers, words
  int64_t used_ = 0, first_key_ = 0;
  // "rows" hold pairs along the head dim, "columns" pairs along keys or queries; one and the same
  // where words are numbers.
  Word *key_rows_, *key_columns_, *value_rows_;  // [keys, words], [keys / kPair, padded]
  Acc *dk_, *dv_;                                // [keys, padded] from first_key_
  Word *q_rows_, *q_columns_, *q_transposed_;    // [kQueryBlock, words] or [words, kQueryBlock]
  Word *dout_rows_, *dout_columns_, *dout_transposed_;
  Acc *scores_, *dp_;                      // S^T, dP^T [kKeyTile, kQueryBlock]
  Word *p_rows_, *ds_rows_, *ds_columns_;  // P^T, dS^T
  Acc* dq_;                                // [kQueryBlock, padded]
  Acc *lse_, *delta_;
  QueryMasks<SignedOf>* masks_;
  DropoutMask<D>* dropout_ = nullptr;
};

int64_t BackwardScratch(const AttentionProblem& a, bool pairs, int64_t keys) {
  return VisitPath(a, pairs, [&](auto path) {
    return Backward<typename decltype(path)::type>(a, keys, nullptr).used();
  });
}
void BackwardUnit(const AttentionProblem& a, bool pairs, int64_t keys, const AttentionUnit& u,
                  char* scratch) {
  VisitPath(a, pairs, [&](auto path) {
    Backward<typename decltype(path)::type>(a, keys, scratch).Run(u);
    return 0;
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
HWY_EXPORT(BackwardScratch);
HWY_EXPORT(BackwardUnit);

int64_t AttentionBackwardScratch(const AttentionProblem& a, bool pairs, int64_t keys) {
  return HWY_DYNAMIC_DISPATCH(BackwardScratch)(a, pairs, keys);
}
void RunAttentionBackwardUnit(const AttentionProblem& a, bool pairs, int64_t keys,
                              const AttentionUnit& u, char* scratch) {
  HWY_DYNAMIC_DISPATCH(BackwardUnit)(a, pairs, keys, u, scratch);
}
}  // namespace shoal::kernels::cpu
#endif
