// Conversions of float8e4m3fn numbers on the emulator.
#pragma once

#include "kernels/device.h"

namespace emulator {

inline float widen_fp8(uint8_t bits) {
  const int exponent = bits >> 3 & 0xf;
  const int fraction = bits & 7;
  const float sign = bits >> 7 ? -1.0f : 1.0f;
  if (exponent == 0xf && fraction == 7) return std::nanf("");
  return exponent == 0 ? sign * std::ldexp(static_cast<float>(fraction), -9)
                       : sign * std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
}

}  // namespace emulator

namespace device {

template <class T>
constexpr bool kConvertsFp8 = false;
template <>
constexpr bool kConvertsFp8<Half> = true;  // as from compute capability 8.9 on
template <class T>
void convert_fp8(uint32_t (&pairs)[2], uint32_t bytes) {
  for (int i = 0; i < 2; ++i) {
    pairs[i] = pack<T>(emulator::widen_fp8(static_cast<uint8_t>(bytes >> 16 * i)),
                       emulator::widen_fp8(static_cast<uint8_t>(bytes >> (16 * i + 8))));
  }
}

}  // namespace device
