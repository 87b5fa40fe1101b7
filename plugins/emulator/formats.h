// Half precision and bfloat16 in software, rounding to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Half {
  uint16_t bits;

  static float widen(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = half >> 10 & 0x1f;
    const uint32_t fraction = half & 0x3ff;
    if (exponent == 0x1f) return bits_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0)
      return std::copysign(std::ldexp(static_cast<float>(fraction), -24), bits_float(sign | 1));
    return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
  }

  static uint16_t round(float value) {
    const uint32_t bits = float_bits(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (std::isnan(value)) return sign | 0x7fff;
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return sign | 0x7c00;  // halfway between the largest half and 2^16
    if (magnitude < 6.103515625e-5f) {                // subnormal: a multiple of 2^-24
      return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
    }
    const uint32_t kept = bits & 0x7fffffffu;
    const uint32_t rounded = kept + 0xfffu + (kept >> 13 & 1);
    return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
  }
};

struct BFloat16 {
  uint16_t bits;

  static float widen(uint16_t bfloat) { return bits_float(static_cast<uint32_t>(bfloat) << 16); }

  static uint16_t round(float value) {
    const uint32_t bits = float_bits(value);
    if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 & 0x8000u) | 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
  }
};

}  // namespace emulator
