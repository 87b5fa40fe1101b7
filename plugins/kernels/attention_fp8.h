// Numbers of float8e4m3fn as bytes: sign, 4 bits of exponent, 3 of mantissa (graphs/RoundToFp8.onnxtxt).
#pragma once

#include <type_traits>

#include "kernels/fp8_device.h"

namespace sink_window_attention {

constexpr float kLargestFp8 = 448.0f;

// The numbers of the upper bytes of both halves of a word, exactly: every number has a place in Element. The
// seven bits below the sign are moved to where Element's exponent ends, and what the smaller bias of float8
// leaves is a power of two; subnormal numbers become subnormal ones.
template <class Element>
ROTEXPORT_DEVICE uint32_t widen_upper_fp8(uint32_t bytes) {
  constexpr bool kHalf = std::is_same<Element, device::Half>::value;
  constexpr int kShift = kHalf ? 1 : 4;
  constexpr uint32_t kSigns = 0x80008000u;
  constexpr uint32_t kSizes = (0x7f007f00u >> kShift) & ~kSigns;
  constexpr uint32_t kBias = kHalf ? 0x5c005c00u : 0x7b807b80u;  // 2^8, 2^120
  return device::multiply_add_pairs<Element>((bytes & kSigns) | (bytes >> kShift & kSizes), kBias, 0u);
}

// The numbers of a word's bytes: in pair i that of byte i of its low half and that of byte i of its high
// half.
template <class Element>
ROTEXPORT_DEVICE void widen_fp8(uint32_t (&pairs)[2], uint32_t word) {
  if constexpr (device::kConvertsFp8<Element>) {
    device::convert_fp8<Element>(pairs, device::pick_bytes(word, 0u, 0x3120u));
  } else {
    pairs[0] = widen_upper_fp8<Element>(word << 8);
    pairs[1] = widen_upper_fp8<Element>(word);
  }
}

// The byte of the number nearest to `size`, of ties the even one; the largest for what is larger. `size` is
// not negative.
ROTEXPORT_DEVICE uint32_t nearest_fp8(float size) {
  constexpr float kSmallestNormal = 0.015625f;
  constexpr int kDropped = 20;                // bits of a float's fraction
  constexpr uint32_t kBias = (127 - 7) << 3;  // between the exponents of both
  const float number = fminf(size, kLargestFp8);
  if (number < kSmallestNormal) return static_cast<uint32_t>(device::round_to_int(number * 512.0f));
  const uint32_t bits = device::float_bits(number);
  const uint32_t odd = bits >> kDropped & 1;
  return ((bits + (1u << (kDropped - 1)) - 1 + odd) >> kDropped) - kBias;
}

}  // namespace sink_window_attention
