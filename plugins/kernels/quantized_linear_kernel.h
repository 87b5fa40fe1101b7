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
#include "kernels/quantized_linear_sums.h"

namespace quantized_linear {

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
