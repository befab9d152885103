// The order of an epoch as a pure function: a permutation that is never written down, so any rank
// finds any place in it in constant time and memory.
#pragma once

#include <cstdint>

namespace shoal {

// A permutation of [0, n) in `position`, another for every seed and epoch; 0 < n < 2^62.
//
// A Feistel network with Philox as its round function permutes [0, 2^b), the smallest such range
// that holds n; a value outside [0, n) is permuted again until it falls inside ("cycle walking",
// Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002), fewer than two times
// on average.
int64_t ShuffledIndex(uint64_t seed, int64_t epoch, int64_t n, int64_t position);

}  // namespace shoal
