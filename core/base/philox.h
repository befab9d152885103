// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): random
// numbers as a pure function of (key, counter). Nothing in Shoal keeps generator state: initial
// weights, dropout and data order are functions of a seed, a purpose and a global index, so any
// sharding draws the same numbers and a resumed run goes on with them.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>

#ifdef __CUDACC__
#define SHOAL_HOST_DEVICE __host__ __device__
#else
#define SHOAL_HOST_DEVICE
#endif

namespace shoal {

struct PhiloxKey {
  uint64_t seed = 0;    // the run's
  uint64_t stream = 0;  // the purpose: hash of a parameter's name, a dropout site and step, ...
};

struct Philox4 {
  uint32_t v[4];
};

// Four independent 32-bit words for `counter`. The key's seed keys the cipher; the stream is the
// upper half of the 128-bit counter.
SHOAL_HOST_DEVICE inline Philox4 Philox(PhiloxKey key, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(key.stream), c3 = static_cast<uint32_t>(key.stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The 32-bit word of element `index`: word index % 4 of counter index / 4.
SHOAL_HOST_DEVICE inline uint32_t PhiloxWord(PhiloxKey key, uint64_t index) {
  return Philox(key, index / 4).v[index % 4];
}

// Uniform in [0, 1) with 24 bits.
SHOAL_HOST_DEVICE inline float UniformFromWord(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

// FNV-1a: turns a name into a stream number, the same on every machine.
constexpr uint64_t HashName(std::string_view name) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return h;
}

}  // namespace shoal
