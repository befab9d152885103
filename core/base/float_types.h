// Storage types of 16 bits. Arithmetic happens in float; these only convert.
#pragma once

#include <bit>
#include <cstdint>

namespace shoal {

// bfloat16: the upper half of a float. Rounds to nearest, ties to even; NaN stays NaN.
struct BF16 {
  uint16_t bits;
  BF16() = default;
  constexpr explicit BF16(float value) : bits(Round(value)) {}
  constexpr explicit BF16(double value) : BF16(static_cast<float>(value)) {}
  constexpr explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  constexpr explicit operator double() const { return static_cast<float>(*this); }

 private:
  static constexpr uint16_t Round(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
    return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};

// A float as the BF16 nearest to it (of two that are as near the one of larger magnitude) and the
// difference of their bits, from which it can be made again exactly. With ties to even, two floats
// would have the same halves. Subnormals, -0 and infinities are as others; a value beyond the
// largest BF16 has an infinity for nearest, as BF16(value) is, and is made again; a NaN becomes the
// plain one.
struct SplitFloat {
  BF16 nearest;
  int16_t rest;
};
constexpr SplitFloat Split(float value) {
  const uint32_t u = value != value ? 0x7fc00000u : std::bit_cast<uint32_t>(value);
  const auto upper = static_cast<uint16_t>((u + 0x8000u) >> 16);
  return {std::bit_cast<BF16>(upper), static_cast<int16_t>(u & 0xffffu)};
}
constexpr float Join(BF16 nearest, int16_t rest) {
  return std::bit_cast<float>((static_cast<uint32_t>(nearest.bits) << 16) +
                              static_cast<uint32_t>(static_cast<int32_t>(rest)));
}

// IEEE binary16. Rounds to nearest, ties to even; overflow becomes infinity.
struct F16 {
  uint16_t bits;
  F16() = default;
  constexpr explicit F16(float value) : bits(Round(value)) {}
  constexpr explicit F16(double value) : F16(static_cast<float>(value)) {}
  constexpr explicit operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u)
      return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // 2^112 moves the exponent of the shifted bits to its place, subnormals included.
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | sign);
  }
  constexpr explicit operator double() const { return static_cast<float>(*this); }

 private:
  static constexpr uint16_t Round(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
    const uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the float unit round
      const float sum = std::bit_cast<float>(magnitude) + 0.5f;
      return static_cast<uint16_t>(sign |
                                   (std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f)));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
};

}  // namespace shoal
