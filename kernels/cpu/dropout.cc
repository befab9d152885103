#include "kernels/dropout.h"

#include <cmath>

#include "kernels/contract.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/dropout.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "kernels/cpu/philox-inl.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

constexpr int64_t kCounters = 64;  // of a chunk

// words [4 kCounters] = Philox(key, counter + i) for i in [0, kCounters).
void PhiloxChunk(PhiloxKey key, uint64_t counter, uint32_t* words) {
  const hn::ScalableTag<uint64_t> d;
  const auto low = hn::Set(d, 0xffffffffu);
  for (int64_t i = 0; i < kCounters; i += hn::Lanes(d)) {
    auto c0 = hn::Add(hn::Set(d, counter + i), hn::Iota(d, 0)), c1 = hn::ShiftRight<32>(c0);
    auto c2 = hn::Set(d, key.stream), c3 = hn::Set(d, key.stream >> 32);
    PhiloxRounds(d, key.seed, c0, c1, c2, c3);
    hn::StoreInterleaved2(hn::Or(hn::And(c0, low), hn::ShiftLeft<32>(c1)),
                          hn::Or(hn::And(c2, low), hn::ShiftLeft<32>(c3)), d,
                          reinterpret_cast<uint64_t*>(words + 4 * i));
  }
}

// out = x scale where (word >> 8) >= threshold, else 0.
template <class T>
void Drop(T* out, const T* x, const uint32_t* words, int64_t n, int32_t threshold, double scale) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < n; ++i)
      out[i] = static_cast<int32_t>(words[i] >> 8) >= threshold ? x[i] * scale : 0;
  } else {
    const hn::ScalableTag<float> d;
    const hn::RebindToUnsigned<decltype(d)> du;
    const hn::RebindToSigned<decltype(d)> di;
    const auto below = hn::Set(di, threshold - 1);
    const auto factor = hn::Set(d, static_cast<float>(scale));
    const auto* word = reinterpret_cast<const float*>(words);  // words go through Load as they are
    Map<float>(
        n,
        [&](auto, auto v, auto w) {
          const auto high = hn::BitCast(di, hn::ShiftRight<8>(hn::BitCast(du, w)));
          return hn::IfThenElseZero(hn::RebindMask(d, hn::Gt(high, below)), hn::Mul(v, factor));
        },
        out, x, word);
  }
}

void DropoutImpl(const View& out, const View& x, const View& tokens, double p,
                 const PhiloxKey& key) {
  const int64_t rows = x.dim(0), n = x.dim(1);
  // word >> 8 is an integer below 2^24, so that u >= p is a comparison of integers.
  const auto threshold = static_cast<int32_t>(std::ceil(p * 0x1p24));
  VisitFloat(x.dtype, "Dropout", [&](auto tag) {
    using T = typename decltype(tag)::type;
    ParallelFor(rows, rows * n, [&](int64_t begin, int64_t end) {
      HWY_ALIGN uint32_t words[4 * kCounters];
      for (int64_t r = begin; r < end; ++r) {
        const uint64_t first =
            static_cast<uint64_t>(tokens.as<const int64_t>()[r]) * static_cast<uint64_t>(n);
        for (int64_t i = 0; i < n;) {
          const uint64_t index = first + i;
          PhiloxChunk(key, index / 4, words);
          const int64_t skip = index % 4, count = std::min(n - i, 4 * kCounters - skip);
          const int64_t at = r * n + i;
          Drop(out.as<T>() + at, x.as<const T>() + at, words + skip, count, threshold, 1 / (1 - p));
          i += count;
        }
      }
    });
  });
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace shoal::kernels::cpu {
namespace {

HWY_EXPORT(DropoutImpl);

}  // namespace

void Dropout(const Stream&, const View& out, const View& x, const View& tokens, double p,
             const PhiloxKey& key) {
  CheckRank("Dropout", "x", x, 2);
  CheckArray("Dropout", "x", x, x.shape, x.dtype);
  CheckArray("Dropout", "out", out, x.shape, x.dtype);
  CheckArray("Dropout", "tokens", tokens, {x.dim(0)}, DType::kI64);
  SHOAL_CHECK(p >= 0 && p < 1, "Dropout", "p is {}, not in [0, 1)", p);
  HWY_DYNAMIC_DISPATCH(DropoutImpl)(out, x, tokens, p, key);
}

}  // namespace shoal::kernels::cpu
#endif
