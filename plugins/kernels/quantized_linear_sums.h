// The sums of a warp: 8-bit integers out of shared memory, and the tensor cores.
#pragma once

#include "kernels/quantized_linear_pipeline.h"

namespace quantized_linear {

// Four 4-bit integers of a word as 8-bit ones, 16 times as large: the low (0) or the high (1) nibble of each
// byte.
ROTEXPORT_DEVICE uint32_t sixteenfold(uint32_t word, int high) {
  return (high ? word : word << 4) & 0xf0f0f0f0u;
}

// The same less the zero point z and times the factor f of a byte of `factors`, |product| <= 127. With 128
// added to each product none borrows from its neighbour: u f + (128 - (8 + z) f) with u = nibble + 8; the
// sign bits then take the 128 away.
ROTEXPORT_DEVICE uint32_t widened(uint32_t word, int high, int byte) {
  const auto factor = static_cast<uint32_t>(byte & 15);
  const auto least = factor * static_cast<uint32_t>(8 + (byte >> 4));
  const uint32_t unsigned_nibbles = ((high ? word >> 4 : word) & 0x0f0f0f0fu) ^ 0x08080808u;
  return (unsigned_nibbles * factor + (0x80808080u - least * 0x01010101u)) ^ 0x80808080u;
}

// The sums of a warp.
template <class Traits>
class Sums {
 public:
  ROTEXPORT_DEVICE Sums() {
    const int thread = static_cast<int>(device::thread_index());
    const int warp = thread / 32;
    constexpr int kFlat = Traits::kWarpRows * Traits::kWarpColumns;
    g_ = thread % 32 / 4;
    q_ = thread % 4;
    row_ = warp % kFlat / Traits::kWarpColumns * Traits::kRowTiles * 16 + g_;
    column_ = warp % Traits::kWarpColumns * Traits::kColumnTiles * 8;
    depth_ = warp / kFlat;
    ROTEXPORT_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      ROTEXPORT_UNROLL
      for (int c = 0; c < Traits::kColumnTiles; ++c) {
        ROTEXPORT_UNROLL
        for (int i = 0; i < 4; ++i) {
          integers_[r][c][i] = kZero;
          if constexpr (Traits::kGrouped) totals_[r][c][i] = 0.0f;
        }
      }
    }
  }

  // Adds the products of a stage's slices, of which `first` is the first.
  ROTEXPORT_DEVICE void add(const Geometry& geometry, unsigned stage, int first, int slice_end) {
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kOwnSlices; ++i) {
      const int inside = depth_ * Traits::kOwnSlices + i;
      const int slice = first + inside;
      if (slice >= slice_end) return;
      multiply(stage, inside);
      if constexpr (Traits::kGrouped) {
        // The slice that this warp takes next: after its last one of a stage, past those of other warps.
        const int next = slice + 1 + (i + 1 < Traits::kOwnSlices ? 0 : Traits::kSlices - Traits::kOwnSlices);
        if (next >= slice_end || group_of(geometry, next) != group_of(geometry, slice)) {
          scale_group(stage, inside);
        }
      }
    }
  }

  // Adds up the sums of the warps that share a tile; true for the warp that then holds them. All threads call
  // it.
  ROTEXPORT_DEVICE bool gather() {
    if constexpr (Traits::kWarpDepth > 1) {
      using Vector4 = Vector<typename Traits::Sum, 4>;
      constexpr int kTiles = Traits::kRowTiles * Traits::kColumnTiles;
      constexpr int kFlat = Traits::kWarpRows * Traits::kWarpColumns;
      const int lane = static_cast<int>(device::thread_index()) % 32;
      const int warp = static_cast<int>(device::thread_index()) / 32 % kFlat;
      const device::Shared<typename Traits::Sum> shared(0);
      device::barrier();
      if (depth_ > 0) {
        ROTEXPORT_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          Vector4 sums;
          for (int i = 0; i < 4; ++i)
            sums.values[i] = sum(tile / Traits::kColumnTiles, tile % Traits::kColumnTiles, i);
          shared.store((((depth_ - 1) * kFlat + warp) * kTiles + tile) * 128 + 4 * lane, sums);
        }
      }
      device::barrier();
      if (depth_ > 0) return false;
      ROTEXPORT_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        for (int depth = 1; depth < Traits::kWarpDepth; ++depth) {
          const auto sums =
              shared.template load<Vector4>((((depth - 1) * kFlat + warp) * kTiles + tile) * 128 + 4 * lane);
          for (int i = 0; i < 4; ++i)
            sum(tile / Traits::kColumnTiles, tile % Traits::kColumnTiles, i) += sums.values[i];
        }
      }
    }
    return true;
  }

  ROTEXPORT_DEVICE typename Traits::Sum& sum(int r, int c, int i) {
    if constexpr (Traits::kGrouped) {
      return totals_[r][c][i];
    } else {
      return integers_[r][c][i];
    }
  }

  // Of the tile: the row of sums 0 and 1 (those of 2 and 3 are 8 further down), and the column of sums 0
  // and 2.
  ROTEXPORT_DEVICE int row(int r) const { return row_ + 16 * r; }
  ROTEXPORT_DEVICE int column(int c) const { return column_ + 8 * c + 2 * q_; }

 private:
  // Sums of a group begin at 1.5 * 2^23, read as float32: while they move by at most 2^22, their bits are the
  // float32 of the same value, and need no conversion.
  static constexpr float kOffset = 12582912.0f;
  static constexpr int32_t kZero = Traits::kGrouped ? 0x4b400000 : 0;

  ROTEXPORT_DEVICE void multiply(unsigned stage, int inside) {
    uint32_t left[Traits::kRowTiles][4];
    ROTEXPORT_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      ROTEXPORT_UNROLL
      for (int half = 0; half < 2; ++half) {
        load_row(stage + inside * Traits::kXStep, row_ + 16 * r + 8 * half, left[r][half], left[r][half + 2]);
      }
    }
    ROTEXPORT_UNROLL
    for (int c = 0; c < Traits::kColumnTiles; ++c) {
      uint32_t right[2];
      load_column(stage, inside, column_ + 8 * c + g_, right);
      ROTEXPORT_UNROLL
      for (int r = 0; r < Traits::kRowTiles; ++r) device::multiply_add_int8(integers_[r][c], left[r], right);
    }
  }

  ROTEXPORT_DEVICE void load_row(unsigned base, int row, uint32_t& first, uint32_t& second) const {
    const device::Shared<int8_t> shared(base);
    if constexpr (Traits::kXBits == 4) {
      const auto word = shared.template load<uint32_t>(row * Traits::kXSliceBytes + 4 * q_);
      first = sixteenfold(word, 0);
      second = sixteenfold(word, 1);
    } else {
      const auto words = shared.template load<Vector<uint32_t, 2>>(row * Traits::kXSliceBytes + 8 * q_);
      first = words.values[0];
      second = words.values[1];
      if constexpr (Traits::kWeightBits == 4) {
        first = device::pick_bytes(words.values[0], words.values[1], 0x6420);
        second = device::pick_bytes(words.values[0], words.values[1], 0x7531);
      }
    }
  }

  ROTEXPORT_DEVICE void load_column(unsigned stage, int inside, int column, uint32_t (&right)[2]) const {
    const device::Shared<int8_t> shared(stage + Traits::kWeightOffset + inside * Traits::kWeightStep);
    if constexpr (Traits::kWeightBits == 8) {
      const auto words =
          shared.template load<Vector<uint32_t, 2>>(column * Traits::kWeightSliceBytes + 8 * q_);
      for (int i = 0; i < 2; ++i) right[i] = words.values[i];
    } else {
      const auto word = shared.template load<uint32_t>(column * Traits::kWeightSliceBytes + 4 * q_);
      if constexpr (Traits::kScales == Scales::kTwoLevel) {
        const device::Shared<int8_t> factors(stage + Traits::kScaleOffset + inside * Traits::kScaleBytes);
        const int byte = factors.template load<int8_t>(column);
        for (int i = 0; i < 2; ++i) right[i] = widened(word, i, byte);
      } else {
        for (int i = 0; i < 2; ++i) right[i] = sixteenfold(word, i);
      }
    }
  }

  ROTEXPORT_DEVICE void scale_group(unsigned stage, int inside) {
    using Scale = Vector<float, 2>;
    const device::Shared<float> shared(stage + Traits::kScaleOffset + inside * Traits::kScaleBytes);
    ROTEXPORT_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      float row_scale[2] = {1.0f, 1.0f};
      if constexpr (Traits::kScales == Scales::kRowGroup) {
        for (int half = 0; half < 2; ++half)
          row_scale[half] = shared.template load<float>(Traits::kColumns + row_ + 16 * r + 8 * half);
      }
      ROTEXPORT_UNROLL
      for (int c = 0; c < Traits::kColumnTiles; ++c) {
        const auto scale = shared.template load<Scale>(column(c));
        ROTEXPORT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float group = device::bits_float(static_cast<uint32_t>(integers_[r][c][i])) - kOffset;
          float factor = scale.values[i % 2];
          if constexpr (Traits::kScales == Scales::kRowGroup) factor *= row_scale[i / 2];
          totals_[r][c][i] += group * factor;
          integers_[r][c][i] = kZero;
        }
      }
    }
  }

  int g_;
  int q_;
  int row_;
  int column_;
  int depth_;
  int32_t integers_[Traits::kRowTiles][Traits::kColumnTiles][4];
  float totals_[Traits::kGrouped ? Traits::kRowTiles : 1][Traits::kGrouped ? Traits::kColumnTiles : 1][4];
};

}  // namespace quantized_linear
