// Register-tiled products and packing for attention, compiled once per instruction set.
// Past 500 lines: one toggled header is all that Highway compiles again for each instruction set.
//
// Scores are kept transposed, S^T [keys, queries]: then softmax statistics are vectors over
// queries, and each product of forward and backward takes its operands as they lie in memory. Only
// Q and dO have to be transposed, once per block of queries:
//   S^T = K Q^T, dP^T = V dO^T, O = (P^T)^T V, dV = P^T dO, dK = dS^T Q, dQ = (dS^T)^T K.
//
// A Path says what a product's operands are made of. The unit is a word: one number, or, for the
// dot product instruction of AVX-512 BF16, a pair of bf16 that are neighbours along the reduction.

#if defined(SHOAL_KERNELS_CPU_ATTENTION_TILES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHOAL_KERNELS_CPU_ATTENTION_TILES_INL_H_
#undef SHOAL_KERNELS_CPU_ATTENTION_TILES_INL_H_
#else
#define SHOAL_KERNELS_CPU_ATTENTION_TILES_INL_H_
#endif

#include <cstring>
#include <type_traits>
#include <utility>

#include "hwy/cache_control.h"
#include "kernels/cpu/attention_masks-inl.h"
#include "kernels/cpu/attention_plan.h"
#include "kernels/cpu/simd-inl.h"

#undef SHOAL_ATTENTION_BF16_DOT
#if HWY_TARGET <= HWY_AVX3 && HWY_COMPILER_GCC_ACTUAL && HWY_ARCH_X86_64
#define SHOAL_ATTENTION_BF16_DOT 1
#else
#define SHOAL_ATTENTION_BF16_DOT 0
#endif

HWY_BEFORE_NAMESPACE();
// Highway 1.0.3 has no target with this extension. The compiler itself never emits its
// instructions, so code of the other paths stays valid on CPUs without it.
#if SHOAL_ATTENTION_BF16_DOT
#pragma GCC target("avx512bf16")
#endif
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// Numbers of type Acc throughout, whatever the type of the arguments.
template <class InT, class AccT>
struct PlainPath {
  using In = InT;
  using Acc = AccT;
  using Word = Acc;
  static constexpr int64_t kPair = 1;
  using D = hn::ScalableTag<Acc>;
  using V = hn::Vec<D>;
  static HWY_INLINE V Broadcast(const Word* p) { return hn::Set(D(), *p); }
  static HWY_INLINE V Words(const Word* p) { return hn::Load(D(), p); }
  static HWY_INLINE V MulAdd(V a, V b, V c) { return hn::MulAdd(a, b, c); }
};

#if SHOAL_ATTENTION_BF16_DOT
struct PairPath {
  using In = BF16;
  using Acc = float;
  using Word = uint32_t;
  static constexpr int64_t kPair = 2;
  using D = hn::ScalableTag<float>;
  using V = hn::Vec<D>;
  static HWY_INLINE V Broadcast(const Word* p) {
    return hn::BitCast(D(), hn::Set(hn::ScalableTag<uint32_t>(), *p));
  }
  static HWY_INLINE V Words(const Word* p) {
    return hn::BitCast(D(), hn::Load(hn::ScalableTag<uint32_t>(), p));
  }
  static HWY_INLINE V MulAdd(V a, V b, V c) {
    return V{_mm512_dpbf16_ps(c.raw, (__m512bh)a.raw, (__m512bh)b.raw)};
  }
  // Pairs (lower[i], upper[i]) to p[i]. Halves round away from zero, which is not worth more.
  static HWY_INLINE void StorePairs(V lower, V upper, Word* p) {
    const hn::ScalableTag<uint32_t> du;
    const auto half = hn::Set(du, 0x8000u);
    const auto a = hn::ShiftRight<16>(hn::Add(hn::BitCast(du, lower), half));
    const auto b = hn::Add(hn::BitCast(du, upper), half);
    hn::Store(hn::OrAnd(a, b, hn::Set(du, 0xffff0000u)), du, p);
  }
  static HWY_INLINE void StoreRow(V v, BF16* p) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v.raw));
  }
};
#endif

// Calls f(TypeTag<P>) with the path for the problem's dtype.
template <class F>
auto VisitPath(const AttentionProblem& a, bool pairs, F f) {
#if SHOAL_ATTENTION_BF16_DOT
  if (pairs && a.q.dtype == DType::kBF16) return f(TypeTag<PairPath>());
#endif
  (void)pairs;
  if (a.q.dtype == DType::kF64) return f(TypeTag<PlainPath<double, double>>());
  if (a.q.dtype == DType::kF32) return f(TypeTag<PlainPath<float, float>>());
  return f(TypeTag<PlainPath<BF16, float>>());
}

// --- products ------------------------------------------------------------------------------------

// How many vectors wide a register tile is: kGroup times this, and the operands, fit the registers.
constexpr int64_t kTileVectors = HWY_TARGET <= HWY_AVX3 ? 4 : 2;

template <class F, size_t... I>
HWY_INLINE void Unroll(std::index_sequence<I...>, const F& f) {
  (f(std::integral_constant<size_t, I>()), ...);
}

// What becomes of a product's tile.
enum class Into {
  kScaled,    // C = scale A B
  kAdded,     // C += A B
  kRescaled,  // C = rows[m] C + A B
};

// kGroup x (NV vectors) of a product over k words. `a` is read at m * a_step + i (kRows) or at
// i * a_step + m; b and c have rows of b_step and c_step.
template <class P, int64_t NV, bool kRows, Into kInto>
HWY_NOINLINE void MultiplyTile(const typename P::Word* HWY_RESTRICT a, int64_t a_step,
                               const typename P::Word* HWY_RESTRICT b, int64_t b_step, int64_t k,
                               typename P::Acc* HWY_RESTRICT c, int64_t c_step,
                               typename P::Acc scale, const typename P::Acc* HWY_RESTRICT rows) {
  using V = typename P::V;
  const typename P::D d;
  const int64_t lanes = hn::Lanes(d);
  constexpr auto kM = std::make_index_sequence<kGroup>();
  constexpr auto kN = std::make_index_sequence<NV>();
  V sum[kGroup][NV];
  Unroll(kM,
         [&](auto m) HWY_ATTR { Unroll(kN, [&](auto n) HWY_ATTR { sum[m][n] = hn::Zero(d); }); });
  const typename P::Word* a_row[kGroup];
  Unroll(kM, [&](auto m) HWY_ATTR { a_row[m] = a + m * (kRows ? a_step : 1); });
  for (int64_t i = 0; i < k; ++i) {
    V bv[NV];
    Unroll(kN, [&](auto n) HWY_ATTR { bv[n] = P::Words(b + n * lanes); });
    Unroll(kM, [&](auto m) HWY_ATTR {
      const V av = P::Broadcast(kRows ? a_row[m] + i : a + m);
      Unroll(kN, [&](auto n) HWY_ATTR { sum[m][n] = P::MulAdd(av, bv[n], sum[m][n]); });
    });
    if constexpr (!kRows) a += a_step;
    b += b_step;
  }
  Unroll(kM, [&](auto m) HWY_ATTR {
    typename P::Acc* HWY_RESTRICT c_row = c + m * c_step;
    V factor;
    if constexpr (kInto == Into::kScaled) factor = hn::Set(d, scale);
    if constexpr (kInto == Into::kRescaled) factor = hn::Set(d, rows[m]);
    Unroll(kN, [&](auto n) HWY_ATTR {
      typename P::Acc* p = c_row + n * lanes;
      if constexpr (kInto == Into::kScaled) hn::Store(hn::Mul(sum[m][n], factor), d, p);
      if constexpr (kInto == Into::kAdded) hn::Store(hn::Add(hn::Load(d, p), sum[m][n]), d, p);
      if constexpr (kInto == Into::kRescaled)
        hn::Store(hn::MulAdd(hn::Load(d, p), factor, sum[m][n]), d, p);
    });
  });
}

// The same for a width of `vectors`, at most NV.
template <class P, bool kRows, Into kInto, int64_t NV = kTileVectors>
HWY_INLINE void Multiply(int64_t vectors, const typename P::Word* a, int64_t a_step,
                         const typename P::Word* b, int64_t b_step, int64_t k, typename P::Acc* c,
                         int64_t c_step, typename P::Acc scale = 1,
                         const typename P::Acc* rows = nullptr) {
  if (vectors == NV)
    return MultiplyTile<P, NV, kRows, kInto>(a, a_step, b, b_step, k, c, c_step, scale, rows);
  if constexpr (NV > 1)
    Multiply<P, kRows, kInto, NV - 1>(vectors, a, a_step, b, b_step, k, c, c_step, scale, rows);
}

// Calls f(begin, end) on `vectors` cut into even pieces that a register tile can hold.
template <class F>
HWY_INLINE void ForTileColumns(int64_t vectors, F f) {
  const int64_t pieces = (vectors + kTileVectors - 1) / kTileVectors;
  for (int64_t p = 0; p < pieces; ++p) f(vectors * p / pieces, vectors * (p + 1) / pieces);
}

// --- packing -------------------------------------------------------------------------------------

template <class T>
HWY_INLINE const T* RowOf(const View& x, int64_t b, int64_t t, int64_t n) {
  return x.as<const T>() + b * x.strides[0] + t * x.strides[1] + n * x.strides[2];
}
template <class T>
HWY_INLINE T* MutableRowOf(const View& x, int64_t b, int64_t t, int64_t n) {
  return x.as<T>() + b * x.strides[0] + t * x.strides[1] + n * x.strides[2];
}

// Copies h numbers as raw bytes where no conversion is needed, with zeros up to `padded`.
template <class P>
HWY_INLINE void PackRow(const typename P::In* from, int64_t h, int64_t padded,
                        typename P::Word* to) {
  using In = typename P::In;
  if constexpr (P::kPair == 2 || std::is_same_v<In, typename P::Word>) {
    const hn::ScalableTag<uint8_t> d;
    const int64_t lanes = hn::Lanes(d), bytes = h * sizeof(In), all = padded * sizeof(In);
    const auto* source = reinterpret_cast<const uint8_t*>(from);
    auto* target = reinterpret_cast<uint8_t*>(to);
    int64_t i = 0;
    for (; i + lanes <= bytes; i += lanes) hn::StoreU(hn::LoadU(d, source + i), d, target + i);
    std::memcpy(target + i, source + i, bytes - i);
    std::memset(target + bytes, 0, all - bytes);
  } else {
    Map<typename P::Acc>(
        h, [](auto, auto v) HWY_ATTR { return v; }, to, from);
    for (int64_t i = h; i < padded; ++i) to[i] = 0;
  }
}

// Rows [begin, begin + count) of head n as rows of `padded` numbers (padded / kPair words), zero
// beyond the head dim; then zero rows up to `rows`.
template <class P>
void PackRows(const View& x, int64_t b, int64_t n, int64_t begin, int64_t count, int64_t rows,
              int64_t padded, typename P::Word* to) {
  // Rows of one head lie on different pages, where the hardware does not prefetch.
  constexpr int64_t kAhead = 16;
  const int64_t h = x.shape[3], words = padded / P::kPair, step = x.strides[1];
  const auto* from = RowOf<typename P::In>(x, b, begin, n);
  for (int64_t r = 0; r < count; ++r, to += words, from += step) {
    if (r + kAhead < count)
      for (int64_t i = 0; i < h; i += 64 / sizeof(*from)) hwy::Prefetch(from + kAhead * step + i);
    PackRow<P>(from, h, padded, to);
  }
  if (rows > count) std::memset(to, 0, (rows - count) * words * sizeof(*to));
}

// `to` [rows / 2, padded] gets the pairs along the rows of `from` [rows, padded] bf16.
HWY_INLINE void PackPairs(const uint32_t* from, int64_t rows, int64_t padded, uint32_t* to) {
  const hn::ScalableTag<uint32_t> du;
  const hn::Rebind<uint16_t, decltype(du)> d16;
  const int64_t lanes = hn::Lanes(du);
  const auto* p = reinterpret_cast<const uint16_t*>(from);
  for (int64_t r = 0; r < rows; r += 2, p += 2 * padded, to += padded) {
    for (int64_t i = 0; i < padded; i += lanes) {
      const auto lower = hn::PromoteTo(du, hn::Load(d16, p + i));
      const auto upper = hn::PromoteTo(du, hn::Load(d16, p + padded + i));
      hn::Store(hn::Or(lower, hn::ShiftLeft<16>(upper)), du, to + i);
    }
  }
}

// to[c][r] = from[r][c] for rows x columns words, both multiples of 4 (of 2 for 8-byte words).
HWY_INLINE void TransposeWords(const uint32_t* from, int64_t from_step, int64_t rows,
                               int64_t columns, uint32_t* to, int64_t to_step) {
  const hn::Full128<uint32_t> d;
  const hn::Full128<uint64_t> d64;
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t c = 0; c < columns; c += 4) {
      const uint32_t* p = from + r * from_step + c;
      const auto a0 = hn::Load(d, p), a1 = hn::Load(d, p + from_step),
                 a2 = hn::Load(d, p + 2 * from_step), a3 = hn::Load(d, p + 3 * from_step);
      const auto b0 = hn::BitCast(d64, hn::InterleaveLower(d, a0, a1)),
                 b1 = hn::BitCast(d64, hn::InterleaveUpper(d, a0, a1)),
                 b2 = hn::BitCast(d64, hn::InterleaveLower(d, a2, a3)),
                 b3 = hn::BitCast(d64, hn::InterleaveUpper(d, a2, a3));
      uint32_t* q = to + c * to_step + r;
      hn::Store(hn::BitCast(d, hn::InterleaveLower(d64, b0, b2)), d, q);
      hn::Store(hn::BitCast(d, hn::InterleaveUpper(d64, b0, b2)), d, q + to_step);
      hn::Store(hn::BitCast(d, hn::InterleaveLower(d64, b1, b3)), d, q + 2 * to_step);
      hn::Store(hn::BitCast(d, hn::InterleaveUpper(d64, b1, b3)), d, q + 3 * to_step);
    }
  }
}
HWY_INLINE void TransposeWords(const float* from, int64_t from_step, int64_t rows, int64_t columns,
                               float* to, int64_t to_step) {
  TransposeWords(reinterpret_cast<const uint32_t*>(from), from_step, rows, columns,
                 reinterpret_cast<uint32_t*>(to), to_step);
}
HWY_INLINE void TransposeWords(const double* from, int64_t from_step, int64_t rows, int64_t columns,
                               double* to, int64_t to_step) {
  const hn::Full128<double> d;
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t c = 0; c < columns; c += 2) {
      const double* p = from + r * from_step + c;
      const auto a0 = hn::Load(d, p), a1 = hn::Load(d, p + from_step);
      hn::Store(hn::InterleaveLower(d, a0, a1), d, to + c * to_step + r);
      hn::Store(hn::InterleaveUpper(d, a0, a1), d, to + (c + 1) * to_step + r);
    }
  }
}

// The first h numbers of `from`, times scale, to one row of an argument.
template <class In, class Acc>
HWY_INLINE void WriteRow(const Acc* from, Acc scale, int64_t h, In* to) {
  Map<Acc>(
      h, [scale](auto d, auto v) HWY_ATTR { return hn::Mul(v, hn::Set(d, scale)); }, to, from);
}

// The same of a row of gradients: added to what is there, if that is asked for.
template <class In, class Acc>
HWY_INLINE void GiveRow(const AttentionProblem& a, const Acc* from, Acc scale, const View& to,
                        int64_t b, int64_t t, int64_t n) {
  if (!a.add) return WriteRow(from, scale, a.head_dim, MutableRowOf<In>(to, b, t, n));
  Acc* sums = MutableRowOf<Acc>(to, b, t, n);
  Map<Acc>(
      a.head_dim,
      [scale](auto d, auto v, auto sum) HWY_ATTR { return hn::MulAdd(v, hn::Set(d, scale), sum); },
      sums, from, static_cast<const Acc*>(sums));
}

// --- exponentials --------------------------------------------------------------------------------

// Scores are multiplied by ScoreUnit() * options.scale, and Power() is the exponential in those
// units: base 2 for f32, where that saves a multiplication, base e for f64.
template <class Acc>
constexpr double ScoreUnit() {
  return std::is_same_v<Acc, float> ? 1.4426950408889634074 : 1;
}
// Natural logarithm of one score unit's base.
template <class Acc>
constexpr Acc ScoreLog() {
  return std::is_same_v<Acc, float> ? Acc(0.69314718055994530942) : Acc(1);
}

// 2^x for x up to 127, to 1.2 ulp; 0 below -125; NaN stays. The polynomial is the minimax fit
// of degree 6 on [-1/2, 1/2] (relative error 1.9e-9).
template <class D, IfFloat<D> = 0>
HWY_INLINE hn::Vec<D> Power(D d, hn::Vec<D> x) {
  const hn::RebindToSigned<D> di;
  const auto magic = hn::Set(d, 12582912.0f);  // 1.5 2^23: adding it rounds to an integer
  const auto shifted = hn::Add(x, magic);
  const auto r = hn::Sub(x, hn::Sub(shifted, magic));
  auto p = hn::Set(d, 1.5345811785047358e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.339993142263303e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 9.618488959712252e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.550328776465276e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.24022646890593366f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.6931472057374963f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  const auto scaled =
      hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -125.0f)), scaled);
}
template <class D, std::enable_if_t<std::is_same_v<LaneOf<D>, double>, int> = 0>
HWY_INLINE hn::Vec<D> Power(D d, hn::Vec<D> x) {
  return ExpOf(d, x);
}

// --- the products of attention on a tile ---------------------------------------------------------

// S^T = scale K Q^T: the vectors of each group of keys that some query of theirs sees. rows [*,
// head] at the tile's first key; transposed [head, kQueryBlock]; scores [kKeyTile, kQueryBlock].
template <class P>
void ScoreTile(const AttentionProblem& a, const Tile& t, const typename P::Word* rows,
               const typename P::Word* transposed, typename P::Acc scale, typename P::Acc* scores) {
  const int64_t lanes = hn::Lanes(typename P::D());
  const int64_t words = (a.head_dim + P::kPair - 1) / P::kPair;
  const int64_t row_words = a.padded_head() / P::kPair;
  ForTileColumns((t.queries + lanes - 1) / lanes, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t j = 0; j < t.rows; j += kGroup) {
      const auto [first, last] = QueriesForGroup(a, t, j);
      const int64_t v0 = std::max(begin, first / lanes);
      const int64_t v1 = std::min(end, (last + lanes - 1) / lanes);
      if (v0 >= v1) continue;
      Multiply<P, true, Into::kScaled>(v1 - v0, rows + j * row_words, row_words,
                                       transposed + v0 * lanes, kQueryBlock, words,
                                       scores + j * kQueryBlock + v0 * lanes, kQueryBlock, scale);
    }
  });
}

// C [queries, head] (= rows[q] C, if given) += (P^T)^T B, with P^T in words [rows / kPair,
// kQueryBlock] and B in words [rows / kPair, padded head].
template <class P, Into kInto>
void QueryProduct(const AttentionProblem& a, const Tile& t, const typename P::Word* probabilities,
                  const typename P::Word* b, typename P::Acc* c, const typename P::Acc* rows) {
  const int64_t lanes = hn::Lanes(typename P::D()), padded = a.padded_head();
  ForTileColumns((a.head_dim + lanes - 1) / lanes, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t i = 0; i < t.queries; i += kGroup) {
      const auto [first, last] = RowsForGroup(a, t, i);
      Multiply<P, false, kInto>(end - begin, probabilities + first / P::kPair * kQueryBlock + i,
                                kQueryBlock, b + first / P::kPair * padded + begin * lanes, padded,
                                (last - first) / P::kPair, c + i * padded + begin * lanes, padded,
                                1, rows ? rows + i : nullptr);
    }
  });
}

// C [keys, head] += P^T B, with P^T in words [rows, kQueryBlock / kPair] and B in words [queries /
// kPair, padded head].
template <class P>
void KeyProduct(const AttentionProblem& a, const Tile& t, const typename P::Word* probabilities,
                const typename P::Word* b, typename P::Acc* c) {
  const int64_t lanes = hn::Lanes(typename P::D()), padded = a.padded_head();
  constexpr int64_t kStep = kQueryBlock / P::kPair;
  ForTileColumns((a.head_dim + lanes - 1) / lanes, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t j = 0; j < t.rows; j += kGroup) {
      const auto [first, last] = QueriesForGroup(a, t, j);
      if (first >= last) continue;
      Multiply<P, true, Into::kAdded>(end - begin, probabilities + j * kStep + first / P::kPair,
                                      kStep, b + first / P::kPair * padded + begin * lanes, padded,
                                      (last - first + P::kPair - 1) / P::kPair,
                                      c + j * padded + begin * lanes, padded);
    }
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
