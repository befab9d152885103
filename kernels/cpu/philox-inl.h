// Philox in vectors, compiled once per instruction set.

#if defined(SHOAL_KERNELS_CPU_PHILOX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SHOAL_KERNELS_CPU_PHILOX_INL_H_
#undef SHOAL_KERNELS_CPU_PHILOX_INL_H_
#else
#define SHOAL_KERNELS_CPU_PHILOX_INL_H_
#endif

#include "core/base/philox.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace shoal::kernels::cpu::HWY_NAMESPACE {

// core/base/philox.h in 64-bit lanes: c0 to c3 are the counter's words and become the result's.
// Only the lower halves are read, and kept right: multiplication ignores the upper ones.
template <class D64>
HWY_INLINE void PhiloxRounds(D64 d, uint64_t seed, hwy::HWY_NAMESPACE::Vec<D64>& c0,
                             hwy::HWY_NAMESPACE::Vec<D64>& c1, hwy::HWY_NAMESPACE::Vec<D64>& c2,
                             hwy::HWY_NAMESPACE::Vec<D64>& c3) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::Repartition<uint32_t, D64> d32;
  const auto product = [&](auto a, uint64_t b) HWY_ATTR {
    return hn::MulEven(hn::BitCast(d32, a), hn::BitCast(d32, hn::Set(d, b)));
  };
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const auto p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
    c0 = hn::Xor(hn::Xor(hn::ShiftRight<32>(p1), c1), hn::Set(d, k0));
    c2 = hn::Xor(hn::Xor(hn::ShiftRight<32>(p0), c3), hn::Set(d, k1));
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace shoal::kernels::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
