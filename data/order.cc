#include "data/order.h"

#include <bit>

#include "core/base/error.h"
#include "core/base/philox.h"

namespace shoal {
namespace {
constexpr uint64_t kRounds = 24;
}  // namespace

int64_t ShuffledIndex(uint64_t seed, int64_t epoch, int64_t n, int64_t position) {
  SHOAL_CHECK(n > 0 && n < (int64_t{1} << 62) && position >= 0 && position < n && epoch >= 0,
              "order", "position {} of {} in epoch {}", position, n, epoch);
  const int bits = std::bit_width(static_cast<uint64_t>(n - 1));
  const int high_bits = bits / 2, low_bits = bits - high_bits;
  const uint64_t high_mask = (uint64_t{1} << high_bits) - 1;
  const uint64_t low_mask = (uint64_t{1} << low_bits) - 1;
  const PhiloxKey key{seed, HashName("data order") + static_cast<uint64_t>(epoch)};
  // Halves have at most 31 bits: the round number goes above them in the counter.
  const auto f = [&](uint64_t round, uint64_t half) {
    return Philox(key, round << 32 | half).v[0];
  };

  uint64_t value = static_cast<uint64_t>(position);
  do {
    uint64_t high = value >> low_bits, low = value & low_mask;
    // Each line can be undone, so the whole is a permutation whatever f is. A few rounds do for
    // large n (Luby and Rackoff, 1988); with halves of one or two bits it takes these many until
    // every order of 5 to 7 sequences is as likely as any other.
    for (uint64_t round = 0; round < kRounds; round += 2) {
      high ^= f(round, low) & high_mask;
      low ^= f(round + 1, high) & low_mask;
    }
    value = high << low_bits | low;
  } while (value >= static_cast<uint64_t>(n));
  return static_cast<int64_t>(value);
}

}  // namespace shoal
