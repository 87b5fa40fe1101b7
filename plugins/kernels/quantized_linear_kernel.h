// The kernel behind quantized_linear.h.
//
// A thread block computes a tile of y: rows of x times rows of w, both of which lie along K in memory as the
// integer tensor cores want them, 32 elements (a slice) at a time. Which elements of a slice a lane holds is
// free as long as it is the same for x and w: lane 4 g + q holds the eight elements 8 q ... 8 q + 7 of rows g
// and g + 8 of x and of row g of w. Of 8-bit integers the first four go into one register, the rest into the
// other; of 4-bit ones the even and the odd elements, which masks take out of a word. Those are then 16 times
// too large, which the scale undoes, unless factors widen them.
#pragma once

#include "kernels/quantized_linear_ending.h"

namespace quantized_linear {

using Pair = Vector<uint32_t, 2>;
using Quad = Vector<uint32_t, 4>;

// The tile, and the part of K, of a thread block.
struct Place {
  int first_row;
  int first_column;
  int first_slice;
  int slice_end;
  int split;
};

// Thread blocks that run at the same time share columns of w, and rows of x up to as many as the L2 cache
// holds.
ROTEXPORT_DEVICE Place place_of(const Geometry& geometry, int rows, int columns) {
  constexpr int kBand = 32;
  const int tiles = geometry.row_tiles * geometry.column_tiles;
  const int block = static_cast<int>(device::block_index());
  const int tile = block % tiles;
  const int band = tile / (kBand * geometry.column_tiles);
  const int left = geometry.row_tiles - kBand * band;
  const int height = left < kBand ? left : kBand;
  const int inside = tile - band * kBand * geometry.column_tiles;
  Place place;
  place.split = block / tiles;
  place.first_row = (kBand * band + inside % height) * rows;
  place.first_column = inside / height * columns;
  place.first_slice = place.split * geometry.split_slices;
  place.slice_end = place.first_slice + geometry.split_slices;
  if (place.slice_end > geometry.slices) place.slice_end = geometry.slices;
  return place;
}

ROTEXPORT_DEVICE int group_of(const Geometry& geometry, int slice) {
  return static_cast<int>(static_cast<uint32_t>(slice) * geometry.group_inverse >> kInverseShift);
}

// Brings stages of the tile's operands into shared memory, in order.
template <class Traits>
class Pipeline {
 public:
  ROTEXPORT_DEVICE Pipeline(const Geometry& geometry, const KernelOperands& operands, const Place& place)
      : geometry_(geometry), operands_(operands), place_(place) {}

  // Rows past the end of x are zeros; where there are many they repeat the last row instead.
  ROTEXPORT_DEVICE void clear_absent_rows() const {
    if constexpr (Traits::kDecodes) {
      const device::Shared<uint32_t> shared(0);
      constexpr int kVectors = Traits::kXStep / 16;
      constexpr int kAll = Traits::kStages * Traits::kSlices * kVectors;
      for (int i = thread(); i < kAll; i += Traits::kThreads) {
        const int slice = i / kVectors;
        const int at = slice / Traits::kSlices * Traits::kStageBytes +
                       slice % Traits::kSlices * Traits::kXStep + i % kVectors * 16;
        shared.store(at / 4, Quad{});
      }
      device::barrier();
    }
  }

  ROTEXPORT_DEVICE void start(int stage) const {
    if (first_slice(stage) < place_.slice_end) {
      const unsigned base = slot(stage);
      copy_tile<Traits::kRows, Traits::kXSliceBytes, Traits::kDecodes>(
          base, operands_.x, geometry_.x_bytes, place_.first_row, geometry_.rows, stage);
      copy_tile<Traits::kColumns, Traits::kWeightSliceBytes, false>(
          base + Traits::kWeightOffset, operands_.weight, geometry_.weight_bytes, place_.first_column,
          geometry_.outputs, stage);
      if constexpr (Traits::kScales == Scales::kTwoLevel) copy_factors(base + Traits::kScaleOffset, stage);
      if constexpr (Traits::kGrouped) copy_scales(base + Traits::kScaleOffset, stage);
    }
    device::copy_async_commit();
  }

  ROTEXPORT_DEVICE int first_slice(int stage) const { return place_.first_slice + stage * Traits::kSlices; }

  static ROTEXPORT_DEVICE unsigned slot(int stage) {
    return static_cast<unsigned>(stage % Traits::kStages) * Traits::kStageBytes;
  }

 private:
  static ROTEXPORT_DEVICE int thread() { return static_cast<int>(device::thread_index()); }

  template <int kRows, int kSliceBytes, bool kSkipsAbsent>
  ROTEXPORT_DEVICE void copy_tile(unsigned to, const int8_t* from, int row_bytes, int first_row, int rows,
                                  int stage) const {
    constexpr int kChunks = Traits::kSlices * kSliceBytes / 16;  // of a row
    constexpr int kStep = kRows * kSliceBytes + Traits::kGap;
    static_assert(kRows * kChunks % Traits::kThreads == 0, "every thread copies as many chunks");
    const device::Shared<int8_t> shared(to);
    const int first_byte = first_slice(stage) * kSliceBytes;
    ROTEXPORT_UNROLL
    for (int i = 0; i < kRows * kChunks / Traits::kThreads; ++i) {
      const int index = i * Traits::kThreads + thread();
      const int chunk = index % kChunks;
      const int row = index / kChunks;
      const int inside = chunk * 16;
      const int at = inside / kSliceBytes * kStep + row * kSliceBytes + inside % kSliceBytes;
      int source = first_row + row;
      if (source >= rows) {
        if (kSkipsAbsent) continue;
        source = rows - 1;
      }
      // Past the end of a row any bytes will do: w is zero beyond the length of x, and what lies beyond the
      // length of w is not multiplied.
      int byte = first_byte + inside;
      if (byte > row_bytes - 16) byte = row_bytes - 16;
      device::copy_async(shared, at, from + static_cast<int64_t>(source) * row_bytes + byte);
    }
  }

  ROTEXPORT_DEVICE int group_of_slice(int slice) const {
    return group_of(geometry_, slice < geometry_.slices ? slice : geometry_.slices - 1);
  }

  // The scales of the tile's columns, and of its rows where they have one for each group, slice by slice.
  ROTEXPORT_DEVICE void copy_scales(unsigned to, int stage) const {
    constexpr int kWords = Traits::kScaleBytes / 4;
    const device::Shared<float> shared(to);
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kSlices * kWords / Traits::kThreads; ++i) {
      const int index = i * Traits::kThreads + thread();
      const int group = group_of_slice(first_slice(stage) + index / kWords);
      const int word = index % kWords;
      if (word < Traits::kColumns) {
        const int column = at_most(place_.first_column + word, geometry_.outputs - 1);
        device::copy_async<4>(shared, index, operands_.group_scale + group * geometry_.outputs + column);
      } else {
        const int row = at_most(place_.first_row + word - Traits::kColumns, geometry_.rows - 1);
        device::copy_async<4>(shared, index, operands_.row_scale + row * geometry_.row_scales + group);
      }
    }
  }

  // Four factors at a time, unless rows of them begin anywhere.
  ROTEXPORT_DEVICE void copy_factors(unsigned to, int stage) const {
    constexpr int kQuads = Traits::kColumns / 4;
    const device::Shared<int8_t> shared(to);
    for (int index = thread(); index < Traits::kSlices * kQuads; index += Traits::kThreads) {
      const int row = group_of_slice(first_slice(stage) + index / kQuads) * geometry_.outputs;
      const int column = place_.first_column + 4 * (index % kQuads);
      if (geometry_.outputs % 4 == 0) {
        const int8_t* from = operands_.factors + row + at_most(column, geometry_.outputs - 4);
        device::copy_async<4>(shared, 4 * index, from);
        continue;
      }
      for (int i = 0; i < 4; ++i) {
        const int at = row + at_most(column + i, geometry_.outputs - 1);
        shared.store(4 * index + i, operands_.single_factors.template load<int8_t>(at));
      }
    }
  }

  static ROTEXPORT_DEVICE int at_most(int value, int limit) { return value < limit ? value : limit; }

  const Geometry& geometry_;
  const KernelOperands& operands_;
  const Place& place_;
};

// Four 4-bit integers of a word as 8-bit ones, 16 times as large: the low (0) or the high (1) nibble of each
// byte.
ROTEXPORT_DEVICE uint32_t sixteenfold(uint32_t word, int high) {
  return (high ? word : word << 4) & 0xf0f0f0f0u;
}

// The same times a factor, |product| <= 127. With 128 added to each product none borrows from its neighbour:
// u f + (128 - 8 f) with u = nibble + 8; the sign bits then take the 128 away.
ROTEXPORT_DEVICE uint32_t widened(uint32_t word, int high, uint32_t factor) {
  const uint32_t unsigned_nibbles = ((high ? word >> 4 : word) & 0x0f0f0f0fu) ^ 0x08080808u;
  return (unsigned_nibbles * factor + (0x80808080u - factor * 0x08080808u)) ^ 0x80808080u;
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
      const auto words = shared.template load<Pair>(row * Traits::kXSliceBytes + 8 * q_);
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
      const auto words = shared.template load<Pair>(column * Traits::kWeightSliceBytes + 8 * q_);
      for (int i = 0; i < 2; ++i) right[i] = words.values[i];
    } else {
      const auto word = shared.template load<uint32_t>(column * Traits::kWeightSliceBytes + 4 * q_);
      if constexpr (Traits::kScales == Scales::kTwoLevel) {
        const device::Shared<int8_t> factors(stage + Traits::kScaleOffset + inside * Traits::kScaleBytes);
        const auto factor = static_cast<uint32_t>(int32_t{factors.template load<int8_t>(column)});
        for (int i = 0; i < 2; ++i) right[i] = widened(word, i, factor);
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

// Stores two neighbouring sums of a split, or ends them.
template <class Sum>
ROTEXPORT_DEVICE void finish(const Geometry& geometry, const KernelOperands& operands, const Place& place,
                             int at_row, int at_column, const Row& row, const Column (&columns)[2], Sum first,
                             Sum second) {
  if (at_row >= geometry.rows || at_column >= geometry.outputs) return;
  const uint32_t index = static_cast<uint32_t>(at_row) * geometry.outputs + at_column;
  const bool both = at_column + 1 < geometry.outputs;
  if (geometry.splits > 1) {
    const auto partial =
        operands.partial.from(static_cast<int64_t>(place.split) * geometry.rows * geometry.outputs);
    partial.store(index, first);
    if (both) partial.store(index + 1, second);
    return;
  }
  const float values[2] = {scaled(static_cast<float>(first), row, columns[0]),
                           scaled(static_cast<float>(second), row, columns[1])};
  if (both && geometry.outputs % 2 == 0) {
    end_and_store(geometry, operands, index, true, values[0], values[1]);
  } else {
    end_and_store(geometry, operands, index, false, values[0], 0.0f);
    if (both) end_and_store(geometry, operands, index + 1, false, values[1], 0.0f);
  }
}

template <class Traits>
ROTEXPORT_DEVICE void write(const Geometry& geometry, const KernelOperands& operands, const Place& place,
                            Sums<Traits>& sums) {
  Row rows[2 * Traits::kRowTiles];
  ROTEXPORT_UNROLL
  for (int i = 0; i < 2 * Traits::kRowTiles; ++i) {
    const int row = place.first_row + sums.row(i / 2) + i % 2 * 8;
    rows[i] = row_of(geometry, operands, row < geometry.rows ? row : geometry.rows - 1);
  }
  ROTEXPORT_UNROLL
  for (int c = 0; c < Traits::kColumnTiles; ++c) {
    const int column = place.first_column + sums.column(c);
    Column columns[2];
    for (int i = 0; i < 2; ++i) {
      const int known = column + i < geometry.outputs ? column + i : geometry.outputs - 1;
      columns[i] = column_of(geometry, operands, known);
    }
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2 * Traits::kRowTiles; ++i) {
      finish(geometry, operands, place, place.first_row + sums.row(i / 2) + i % 2 * 8, column, rows[i],
             columns, sums.sum(i / 2, c, i % 2 * 2), sums.sum(i / 2, c, i % 2 * 2 + 1));
    }
  }
}

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads, Traits::kGrouped && !Traits::kDecodes ? 1 : 2)
    quantized_linear(Geometry geometry, KernelOperands operands) {
  constexpr int kAhead = Traits::kStages - 1;
  const Place place = place_of(geometry, Traits::kRows, Traits::kColumns);
  const Pipeline<Traits> pipeline(geometry, operands, place);
  pipeline.clear_absent_rows();
  for (int stage = 0; stage < kAhead; ++stage) pipeline.start(stage);
  Sums<Traits> sums;
  for (int stage = 0; pipeline.first_slice(stage) < place.slice_end; ++stage) {
    device::copy_async_wait<kAhead - 1>();
    device::barrier();
    pipeline.start(stage + kAhead);
    sums.add(geometry, pipeline.slot(stage), pipeline.first_slice(stage), place.slice_end);
  }
  device::copy_async_wait<0>();
  if (sums.gather()) write(geometry, operands, place, sums);
}

}  // namespace quantized_linear
