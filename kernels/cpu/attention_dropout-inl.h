// Which probabilities dropout leaves, compiled once per instruction set.

#if defined(SHOAL_KERNELS_CPU_ATTENTION_DROPOUT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHOAL_KERNELS_CPU_ATTENTION_DROPOUT_INL_H_
#undef SHOAL_KERNELS_CPU_ATTENTION_DROPOUT_INL_H_
#else
#define SHOAL_KERNELS_CPU_ATTENTION_DROPOUT_INL_H_
#endif

#include "kernels/cpu/attention_plan.h"
#include "kernels/cpu/philox-inl.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// The mask of a block of queries of one head. One draw serves eight neighbouring keys.
template <class D>
class DropoutMask {
  using U = hwy::MakeUnsigned<LaneOf<D>>;
  using D64 = hn::ScalableTag<uint64_t>;
  // A draw's numbers are 64-bit lanes: those of the even queries and of the odd ones, for 32 bits.
  static constexpr int64_t kParts = 8 / sizeof(U);

 public:
  void SetBlock(const AttentionProblem& a, int64_t b, int64_t head, int64_t query) {
    dropout_ = &a.options.dropout;
    seed_ = AttentionDropoutSeed(dropout_->key, dropout_->first_head + head);
    threshold_ = static_cast<U>(dropout_->Threshold()) << 16;
    const View& starts = dropout_->sequence_starts;
    const int64_t first = starts.as<const int64_t>()[b * starts.strides[0]] + dropout_->q_begin;
    for (int64_t i = 0; i < kQueryBlock; ++i)
      queries_[i % kParts][i / kParts] =
          static_cast<uint64_t>(first + (query + i) * dropout_->q_step);
  }
  // From now on the vector of queries at v of the block.
  void SetVector(int64_t v) {
    v_ = v;
    drawn_ = false;
  }
  // Whose probability of key j stays.
  HWY_INLINE hn::Mask<D> Keeps(D d, int64_t j) {
    const hn::RebindToUnsigned<D> du;
    const auto k = static_cast<uint64_t>(dropout_->k_begin + j * dropout_->k_step);
    if (!drawn_ || k / 8 != group_) Draw(k / 8);
    auto half = hn::Load(du, words_[k % 8 / 2]);
    if (k % 2 == 0) half = hn::ShiftLeft<16>(half);
    if constexpr (kParts == 1) half = hn::And(half, hn::Set(du, 0xffffffffu));
    return hn::RebindMask(d, hn::Not(hn::Gt(hn::Set(du, threshold_), half)));
  }

 private:
  HWY_NOINLINE void Draw(uint64_t group) {
    const D64 d;
    drawn_ = true;
    group_ = group;
    const auto low = hn::Set(d, 0xffffffffu);
    for (int64_t part = 0; part < kParts; ++part) {
      auto c0 = hn::LoadU(d, queries_[part] + v_ / kParts), c1 = hn::ShiftRight<32>(c0);
      auto c2 = hn::Set(d, group), c3 = hn::Set(d, group >> 32);
      PhiloxRounds(d, seed_, c0, c1, c2, c3);
      const auto store = [&](int word, auto c) HWY_ATTR {
        auto* to = reinterpret_cast<uint64_t*>(words_[word]);
        if (part == 0)
          hn::Store(hn::And(c, low), d, to);
        else
          hn::Store(hn::Or(hn::Load(d, to), hn::ShiftLeft<32>(c)), d, to);
      };
      store(0, c0);
      store(1, c1);
      store(2, c2);
      store(3, c3);
    }
  }

  HWY_ALIGN U words_[4][HWY_MAX_BYTES / sizeof(U)];
  HWY_ALIGN uint64_t queries_[kParts][kQueryBlock / kParts];
  const AttentionDropout* dropout_;
  uint64_t seed_, group_;
  int64_t v_;
  U threshold_;
  bool drawn_;
};

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
