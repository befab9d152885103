// Which keys of a tile which queries see, compiled once per instruction set.

#if defined(SHOAL_KERNELS_CPU_ATTENTION_MASKS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHOAL_KERNELS_CPU_ATTENTION_MASKS_INL_H_
#undef SHOAL_KERNELS_CPU_ATTENTION_MASKS_INL_H_
#else
#define SHOAL_KERNELS_CPU_ATTENTION_MASKS_INL_H_
#endif

#include <utility>

#include "kernels/cpu/attention_plan.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// Which rows (keys) of a tile matter to a vector of queries, relative to the tile's first key; all
// even. Rows [begin, end) are seen by some query, [full_begin, full_end) by all of them; the
// register tiles also read [zero_begin, begin) and [end, zero_end), which must be 0.
struct VisibleRows {
  int64_t zero_begin, begin, full_begin, full_end, end, zero_end;
};

struct Tile {
  int64_t query, queries;  // the block
  int64_t key, rows;       // first key, and how many: whole groups, perhaps beyond the last key
  bool masked;             // not every query sees every row
  bool documents;          // visibility depends on documents too
};

HWY_INLINE VisibleRows RowsFor(const AttentionProblem& a, const Tile& t, int64_t first,
                               int64_t count) {
  if (!t.masked) return {0, 0, 0, t.rows, t.rows, t.rows};
  const auto clip = [&](int64_t j) { return std::clamp<int64_t>(j - t.key, 0, t.rows); };
  const int64_t i0 = t.query + first, i1 = i0 + count - 1;
  VisibleRows v;
  v.begin = RoundDown(clip(a.FirstKey(i0)), 2);
  v.end = std::max(v.begin, RoundUp(clip(a.LastKey(i1) + 1), 2));
  v.full_begin = std::clamp(RoundUp(clip(a.FirstKey(i1)), 2), v.begin, v.end);
  v.full_end = std::clamp(RoundDown(clip(a.LastKey(i0) + 1), 2), v.full_begin, v.end);
  if (t.documents) v.full_end = v.full_begin;
  v.zero_begin = std::min(v.begin, clip(a.KeysBegin(i0 - kGroup + 1)));
  v.zero_end = std::max(v.end, clip(a.KeysEnd(i1 + kGroup - 1)));
  return v;
}

// The keys, relative to the tile, that a group of queries at `first` reduces over.
HWY_INLINE std::pair<int64_t, int64_t> RowsForGroup(const AttentionProblem& a, const Tile& t,
                                                    int64_t first) {
  if (!t.masked) return {0, t.rows};
  const int64_t i = t.query + first;
  const int64_t begin = std::clamp<int64_t>(a.KeysBegin(i) - t.key, 0, t.rows);
  return {begin, std::clamp<int64_t>(a.KeysEnd(i + kGroup - 1) - t.key, begin, t.rows)};
}

// The queries, relative to the block and even, that a group of keys at row `first` can be seen by.
HWY_INLINE std::pair<int64_t, int64_t> QueriesForGroup(const AttentionProblem& a, const Tile& t,
                                                       int64_t first) {
  const int64_t all = RoundUp(t.queries, 2);
  if (!t.masked) return {0, all};
  const int64_t j = t.key + first;
  const int64_t begin = RoundDown(std::clamp<int64_t>(a.FirstRow(j) - t.query, 0, all), 2);
  const int64_t end =
      RoundUp(std::clamp<int64_t>(a.LastRow(j + kGroup - 1) + 1 - t.query, begin, all), 2);
  return {begin, end};
}

// Per query of a block: the keys it sees, those strictly between `before` and `end`, relative to a
// tile, and its document.
template <class I>
struct QueryMasks {
  HWY_ALIGN I before[kQueryBlock];
  HWY_ALIGN I end[kQueryBlock];
  HWY_ALIGN I document[kQueryBlock];

  void SetTile(const AttentionProblem& a, const Tile& t) {
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      const int64_t first = a.FirstKey(t.query + i) - t.key, last = a.LastKey(t.query + i) - t.key;
      before[i] = static_cast<I>(std::clamp<int64_t>(first - 1, -1, t.rows));
      end[i] = static_cast<I>(std::clamp<int64_t>(last + 1, 0, t.rows));
    }
  }
  void SetDocuments(const AttentionProblem& a, int64_t b, int64_t query, int64_t queries) {
    for (int64_t i = 0; i < kQueryBlock; ++i)
      document[i] = i < queries ? DocumentOf(a.q_document, b, a.QueryOf(query + i)) : 0;
  }
  static int32_t DocumentOf(const View& documents, int64_t b, int64_t t) {
    return documents.as<const int32_t>()[b * documents.strides[0] + t * documents.strides[1]];
  }
};

// Which queries at `v` see the key of a tile's row.
template <class D, class I>
HWY_INLINE hn::Mask<D> Sees(D d, const AttentionProblem& a, const Tile& t, int64_t b,
                            const QueryMasks<I>& masks, int64_t v, int64_t row) {
  const hn::RebindToSigned<D> di;
  const auto r = hn::Set(di, static_cast<I>(row));
  auto m =
      hn::And(hn::Gt(hn::Load(di, masks.end + v), r), hn::Gt(r, hn::Load(di, masks.before + v)));
  if (t.documents) {
    const int64_t j = std::min(t.key + row, a.keys - 1);  // rows beyond the keys are masked anyway
    const auto document = static_cast<I>(QueryMasks<I>::DocumentOf(a.k_document, b, j));
    m = hn::And(m, hn::Eq(hn::Load(di, masks.document + v), hn::Set(di, document)));
  }
  return hn::RebindMask(d, m);
}

// Cuts the tile of keys [begin, end) down to what the block of queries can see. Empty: rows is 0.
inline Tile MakeTile(const AttentionProblem& a, int64_t b, int64_t query, int64_t queries,
                     int64_t begin, int64_t end) {
  Tile t{query, queries, 0, 0, false, false};
  const int64_t last_query = query + queries - 1;
  begin = std::max(begin, a.KeysBegin(query));
  end = std::min(RoundUp(end, kGroup), a.KeysEnd(last_query));
  if (a.documents() && begin < end) {
    using M = QueryMasks<int32_t>;
    int32_t low = M::DocumentOf(a.q_document, b, a.QueryOf(query)), high = low;
    for (int64_t i = a.QueryOf(query); i <= a.QueryOf(last_query); ++i) {
      const int32_t x = M::DocumentOf(a.q_document, b, i);
      low = std::min(low, x), high = std::max(high, x);
    }
    const auto outside = [&](int64_t j) {
      const int32_t x = M::DocumentOf(a.k_document, b, j);
      return x < low || x > high;
    };
    int64_t first = begin, last = std::min(end, a.keys);
    while (first < last && outside(first)) ++first;
    while (last > first && outside(last - 1)) --last;
    if (first == last) return t;
    begin = RoundDown(first, kGroup);
    end = RoundUp(last, kGroup);
    t.documents = low != high;
    for (int64_t j = begin; j < std::min(end, a.keys); ++j)
      t.documents |= M::DocumentOf(a.k_document, b, j) != low;
  }
  if (begin >= end) return t;
  t.key = begin;
  t.rows = end - begin;
  t.masked = t.documents || a.LastKey(query) < end - 1 || a.FirstKey(last_query) > begin;
  return t;
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
