// Which tile a thread block computes, and how its operands come.
#pragma once

#include "kernels/quantized_linear_tile.h"

namespace quantized_linear {

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
        shared.store(at / 4, Vector<uint32_t, 4>{});
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
      // Past the end of a row any bytes will do: w stands for zero beyond the length of x, and what lies
      // beyond the length of w is not multiplied.
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

}  // namespace quantized_linear
