// Keys and values as codes, for a warp: levels as in graphs/QuantizeTokens.onnxtxt and
// DequantizeTokens.onnxtxt, or numbers as in RoundToFp8.onnxtxt and ReadFp8.onnxtxt.
#pragma once

#include <type_traits>

#include "kernels/attention.h"
#include "kernels/attention_fp8.h"
#include "kernels/attention_sizes.h"
#include "kernels/device.h"

namespace sink_window_attention {

// Two 16-bit halves of words, the low ones or the high ones, side by side.
ROTEXPORT_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return device::pick_bytes(a, b, 0x5410u); }
ROTEXPORT_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return device::pick_bytes(a, b, 0x7632u); }

// How the fields of a word become pairs: pair i holds field i of its low half and field i of its high half.
template <class Element, Format kFormat>
struct Codes {
  static constexpr int kBits = bits_of(kFormat);
  static constexpr int kFields = 16 / kBits;  // of a half
  static constexpr uint32_t kSign = 1u << (kBits - 1);
  static constexpr uint32_t kMask = (1u << kBits) - 1;

  // x = level step + minimum, or number step, step and minimum in pairs, for the first kCount fields.
  template <int kCount>
  static ROTEXPORT_DEVICE void widen(uint32_t (&pairs)[kCount], uint32_t word, uint32_t steps,
                                     uint32_t minima) {
    static_assert(kCount <= kFields, "a half has fewer fields");
    if constexpr (kFormat == Format::kFloat) {
      pairs[0] = word;
    } else if constexpr (kFormat == Format::kFp8) {
      widen_fp8<Element>(pairs, word);
      ROTEXPORT_UNROLL
      for (int i = 0; i < kCount; ++i) {
        pairs[i] = device::multiply_add_pairs<Element>(pairs[i], steps, 0u);
      }
    } else if constexpr (kBits == 8 && std::is_same<Element, device::BFloat16>::value) {
      widen_bytes(pairs, word ^ 0x80808080u, steps, minima);
    } else {
      // A small integer in the last bits of a float's fraction, the exponent such that their unit is 1: no
      // conversion is needed but a subtraction. Codes are levels with the first bit flipped.
      constexpr bool kHalf = std::is_same<Element, device::Half>::value;
      constexpr uint32_t kUnit = kHalf ? 0x6400u : 0x4300u;   // 1024, 128
      constexpr uint32_t kMinus = kHalf ? 0xe400u : 0xc300u;  // their negatives
      constexpr uint32_t kOne = kHalf ? 0x3c00u : 0x3f80u;
      ROTEXPORT_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const uint32_t raised = (word >> kBits * i & twice(kMask)) ^ twice(kUnit | kSign);
        const uint32_t levels = device::multiply_add_pairs<Element>(raised, twice(kOne), twice(kMinus));
        pairs[i] = device::multiply_add_pairs<Element>(levels, steps, minima);
      }
    }
  }

 private:
  static constexpr uint32_t twice(uint32_t half) { return half << 16 | half; }

  // The fraction of bfloat16 is too short for a byte, that of float32 is not.
  template <int kCount>
  static ROTEXPORT_DEVICE void widen_bytes(uint32_t (&pairs)[kCount], uint32_t levels, uint32_t steps,
                                           uint32_t minima) {
    ROTEXPORT_UNROLL
    for (int i = 0; i < kCount; ++i) {
      pairs[i] = device::pack<Element>(
          byte_of(levels, i) * device::low_of<Element>(steps) + device::low_of<Element>(minima),
          byte_of(levels, 2 + i) * device::high_of<Element>(steps) + device::high_of<Element>(minima));
    }
  }
  static ROTEXPORT_DEVICE float byte_of(uint32_t word, int byte) {
    constexpr uint32_t kUnit = 0x4b000000u;  // 2^23
    return device::bits_float(device::pick_bytes(word, kUnit, 0x7440u + byte)) - 8388608.0f;
  }
};

constexpr int kLaneChannels = 8;  // of a token, in each lane of a warp

// A token's channels, eight to a lane, as codes. `scale` holds step and minimum, of which a number has none.
struct LaneCodes {
  uint32_t codes[2];
  uint32_t scale;
};

constexpr float kSmallestStep = 1e-6f;

// What a lane's value and those of its group's other lanes combine to.
template <class Combine>
ROTEXPORT_DEVICE float over_group(float own, int lane, int group, const Combine& combine) {
  const int lanes = group / kLaneChannels;
  const int first = lane - lane % lanes;
  float all = own;
  for (int i = 0; i < lanes; ++i) all = combine(all, device::shuffle(own, first + i));
  return all;
}

template <class Element, Format kFormat>
ROTEXPORT_DEVICE LaneCodes to_levels(const float (&x)[kLaneChannels], int lane, int group) {
  constexpr int kBits = bits_of(kFormat);
  constexpr int kHighest = (1 << kBits) - 1;
  float low = x[0];
  float high = x[0];
  ROTEXPORT_UNROLL
  for (int i = 1; i < kLaneChannels; ++i) {
    low = fminf(low, x[i]);
    high = fmaxf(high, x[i]);
  }
  low = over_group(low, lane, group, [](float a, float b) { return fminf(a, b); });
  high = over_group(high, lane, group, [](float a, float b) { return fmaxf(a, b); });
  LaneCodes made = {};
  made.scale = device::pack<Element>(fmaxf((high - low) / kHighest, kSmallestStep), low);
  const float step = device::low_of<Element>(made.scale);
  const float minimum = device::high_of<Element>(made.scale);
  ROTEXPORT_UNROLL
  for (int i = 0; i < kLaneChannels; ++i) {
    int level = device::round_to_int((x[i] - minimum) / step);
    level = level < 0 ? 0 : level > kHighest ? kHighest : level;
    const uint32_t code = static_cast<uint32_t>(level) ^ 1u << (kBits - 1);
    made.codes[i * kBits / 32] |= code << i * kBits % 32;
  }
  return made;
}

template <class Element>
ROTEXPORT_DEVICE LaneCodes to_fp8(const float (&x)[kLaneChannels], int lane, int group) {
  float largest = 0;
  ROTEXPORT_UNROLL
  for (int i = 0; i < kLaneChannels; ++i) largest = fmaxf(largest, fabsf(x[i]));
  largest = over_group(largest, lane, group, [](float a, float b) { return fmaxf(a, b); });
  LaneCodes made = {};
  made.scale = device::pack<Element>(fmaxf(largest / kLargestFp8, kSmallestStep), 0.0f);
  const float step = device::low_of<Element>(made.scale);
  ROTEXPORT_UNROLL
  for (int i = 0; i < kLaneChannels; ++i) {
    const uint32_t sign = x[i] < 0 ? 0x80u : 0u;
    made.codes[i / 4] |= (sign | nearest_fp8(fabsf(x[i]) / step)) << i % 4 * 8;
  }
  return made;
}

// All lanes of a warp call it; lanes past the token's last channel get something that means nothing.
template <class Element, Format kFormat>
ROTEXPORT_DEVICE LaneCodes quantize(const float (&x)[kLaneChannels], int lane, int group) {
  if constexpr (kFormat == Format::kFp8) {
    return to_fp8<Element>(x, lane, group);
  } else {
    return to_levels<Element, kFormat>(x, lane, group);
  }
}

// The lane's channels of a token [width] of Element; zeros past its end.
template <class Element>
ROTEXPORT_DEVICE void load_channels(float (&x)[kLaneChannels], const device::Global<const Element>& token,
                                    int lane, int width) {
  Vector<uint32_t, 4> words = {};
  if (lane * kLaneChannels < width) words = token.template load<Vector<uint32_t, 4>>(lane * kLaneChannels);
  ROTEXPORT_UNROLL
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = device::low_of<Element>(words.values[i]);
    x[2 * i + 1] = device::high_of<Element>(words.values[i]);
  }
}

// The same of row `index` of `tokens`, minus that of `means` if there are some, rounded to Element.
template <class Element>
ROTEXPORT_DEVICE void load_centered(float (&x)[kLaneChannels], const Element* tokens, const Element* means,
                                    int64_t index, int lane, int width) {
  load_channels(x, device::Global<const Element>(tokens + index * width), lane, width);
  if (means == nullptr) return;
  float mean[kLaneChannels];
  load_channels(mean, device::Global<const Element>(means + index * width), lane, width);
  ROTEXPORT_UNROLL
  for (int i = 0; i < kLaneChannels; i += 2) {
    const uint32_t pair = device::pack<Element>(x[i] - mean[i], x[i + 1] - mean[i + 1]);
    x[i] = device::low_of<Element>(pair);
    x[i + 1] = device::high_of<Element>(pair);
  }
}

// Eight elements of a row of `count`, from `first` on, wherever it lies; zeros behind its end.
template <class Element>
ROTEXPORT_DEVICE Vector<uint32_t, 4> load_loose(const Element* row, int first, int count) {
  const device::Global<const Element> from(row);
  Vector<uint32_t, 4> words = {};
  ROTEXPORT_UNROLL
  for (int i = 0; i < kLaneChannels; ++i) {
    if (first + i >= count) continue;
    words.values[i / 2] |= uint32_t{from.template load<uint16_t>(first + i)} << 16 * (i % 2);
  }
  return words;
}

// A lane's channels, packed again.
template <class Element>
ROTEXPORT_DEVICE Vector<uint32_t, 4> pack_channels(const float (&x)[kLaneChannels]) {
  Vector<uint32_t, 4> words;
  ROTEXPORT_UNROLL
  for (int i = 0; i < 4; ++i) words.values[i] = device::pack<Element>(x[2 * i], x[2 * i + 1]);
  return words;
}

// Stores a lane's codes at `bytes`, where the token's codes begin.
template <Format kFormat, class View>
ROTEXPORT_DEVICE void store_codes(const View& bytes, unsigned start, const LaneCodes& made, int lane) {
  constexpr int kBytes = bits_of(kFormat);  // of eight channels
  const unsigned at = start + lane * kBytes;
  if constexpr (kBytes == 8) {
    bytes.store(at, Vector<uint32_t, 2>{{made.codes[0], made.codes[1]}});
  } else if constexpr (kBytes == 4) {
    bytes.store(at, made.codes[0]);
  } else {
    bytes.store(at, static_cast<uint16_t>(made.codes[0]));
  }
}

// Step and minimum of a group, or the step alone, of the scales that begin at `bytes`.
template <Format kFormat, class View>
ROTEXPORT_DEVICE uint32_t load_scale(const View& bytes, int index) {
  if constexpr (has_levels(kFormat)) {
    return bytes.template load<uint32_t>(index * scale_bytes(kFormat));
  } else {
    return bytes.template load<uint16_t>(index * scale_bytes(kFormat));
  }
}

template <Format kFormat, class View>
ROTEXPORT_DEVICE void store_scale(const View& bytes, int index, uint32_t scale) {
  if constexpr (has_levels(kFormat)) {
    bytes.store(index * scale_bytes(kFormat), scale);
  } else {
    bytes.store(index * scale_bytes(kFormat), static_cast<uint16_t>(scale));
  }
}

}  // namespace sink_window_attention
