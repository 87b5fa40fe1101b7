// Keys and values of a copied tile in registers, as tensor cores take them, for decoding.
#pragma once

#include "kernels/attention_decode_tiles.h"

namespace sink_window_attention {

template <class Traits>
class DecodeWiden : protected DecodeTiles<Traits> {
 protected:
  using Tiles = DecodeTiles<Traits>;
  using typename Tiles::Element;
  using Chunk = Vector<uint32_t, 4>;
  using Tiles::g_;
  using Tiles::stages_;
  using Tiles::Tiles;

  // Eight channels of a key.
  template <Format kFormat>
  ROTEXPORT_DEVICE void widen_key(uint32_t (&keys)[2][2], int stage, int key, int channel) const {
    using Form = Codes<Element, kFormat>;
    const unsigned from = this->template at<kFormat>(stage, kKeys) +
                          key * key_stride(Traits::kSize, kFormat) + channel * Form::kBits / 8;
    if constexpr (kFormat == Format::kFloat) {
      const Chunk words = stages_.template load<Chunk>(from);
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4; ++i) keys[i / 2][i % 2] = words.values[i];
    } else {
      const uint32_t scale =
          stages_.template load<uint32_t>(this->template at<kFormat>(stage, kKeyScales) +
                                          (key * g_.key_groups + (channel * g_.key_group_inverse >> 16)) * 4);
      const uint32_t steps = low_halves(scale, scale);
      const uint32_t minima = high_halves(scale, scale);
      if constexpr (Form::kBits == 8) {
        const auto words = stages_.template load<Vector<uint32_t, 2>>(from);
        Form::widen(keys[0], words.values[0], steps, minima);
        Form::widen(keys[1], words.values[1], steps, minima);
      } else {
        uint32_t word;
        if constexpr (kFormat == Format::kInt4) {
          word = stages_.template load<uint32_t>(from);
        } else {
          word =
              device::pick_bytes(stages_.template load<uint16_t>(from), 0, 0x4140u);  // a byte to each half
        }
        uint32_t pairs[4];
        Form::widen(pairs, word, steps, minima);
        ROTEXPORT_UNROLL
        for (int i = 0; i < 4; ++i) keys[i / 2][i % 2] = pairs[i];
      }
    }
  }

  // Eight columns of the values of two neighbouring keys, in pairs.
  template <Format kFormat>
  ROTEXPORT_DEVICE void widen_values(uint32_t (&values)[8], int stage, int key, int column) const {
    using Form = Codes<Element, kFormat>;
    constexpr unsigned kStride = key_stride(Traits::kSize, kFormat);
    constexpr int kWords = Form::kBits / 4 > 0 ? Form::kBits / 4 : 1;
    const unsigned from =
        this->template at<kFormat>(stage, kValues) + key * kStride + column * Form::kBits / 8;
    uint32_t steps = 0;
    uint32_t minima = 0;
    if constexpr (kFormat != Format::kFloat) {
      const unsigned scales = this->template at<kFormat>(stage, kValueScales) +
                              (key * g_.value_groups + (column * g_.value_group_inverse >> 16)) * 4;
      const auto first = stages_.template load<uint32_t>(scales);
      const auto second = stages_.template load<uint32_t>(scales + 4 * g_.value_groups);
      steps = low_halves(first, second);
      minima = high_halves(first, second);
    }
    if constexpr (kFormat == Format::kInt2) {
      const uint32_t first = stages_.template load<uint16_t>(from);
      const uint32_t second = stages_.template load<uint16_t>(from + kStride);
      Form::widen(values, low_halves(first, second), steps, minima);
    } else {
      using Words = Vector<uint32_t, Form::kBits / 4>;
      const Words first = stages_.template load<Words>(from);
      const Words second = stages_.template load<Words>(from + kStride);
      ROTEXPORT_UNROLL
      for (int i = 0; i < kWords; ++i) {
        uint32_t low[Form::kFields];
        uint32_t high[Form::kFields];
        Form::widen(low, low_halves(first.values[i], second.values[i]), steps, minima);
        Form::widen(high, high_halves(first.values[i], second.values[i]), steps, minima);
        ROTEXPORT_UNROLL
        for (int c = 0; c < Form::kFields; ++c) {
          values[2 * Form::kFields * i + c] = low[c];
          values[2 * Form::kFields * i + Form::kFields + c] = high[c];
        }
      }
    }
  }

 private:
  using Tiles::kKeys;
  using Tiles::kKeyScales;
  using Tiles::kValues;
  using Tiles::kValueScales;
};

}  // namespace sink_window_attention
