// What a thread block of the kernel computes.
#pragma once

#include "kernels/quantized_linear.h"

namespace quantized_linear {

// The part of y that a warp computes (tiles of 16 rows and of 8 columns), how many warps share a thread block
// (along rows, along columns, and along K, whose sums they then add), and the stages of its pipeline.
template <int kRowTiles_, int kColumnTiles_, int kWarpRows_, int kWarpColumns_, int kWarpDepth_, int kSlices_,
          int kStages_>
struct Shape {
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kColumnTiles = kColumnTiles_;
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kWarpColumns = kWarpColumns_;
  static constexpr int kWarpDepth = kWarpDepth_;
  static constexpr int kSlices = kSlices_;  // of a stage
  static constexpr int kStages = kStages_;
  static constexpr int kRows = 16 * kRowTiles * kWarpRows;
  static constexpr int kColumns = 8 * kColumnTiles * kWarpColumns;
  static constexpr int kThreads = 32 * kWarpRows * kWarpColumns * kWarpDepth;
  static constexpr int kOwnSlices = kSlices / kWarpDepth;

  static_assert(kSlices % kWarpDepth == 0, "warps along K take as many slices each");
  static_assert(kStages >= 2, "one stage is copied while another is used");
};

// Few rows: as many bytes of weights in flight as the shared memory of the smallest architecture holds.
template <Format kFormat>
using DecodeShape = Shape<1, 4, 1, 2, 2, 8, kFormat == Format::kW8A8 ? 4 : 6>;
// Many rows. Floating-point groups keep a second set of sums, so a warp has half as many columns.
using PrefillShape = Shape<4, 8, 2, 2, 1, 2, 3>;
using GroupPrefillShape = Shape<4, 4, 2, 4, 1, 2, 3>;

constexpr bool is_grouped(Scales scales) { return scales == Scales::kGroup || scales == Scales::kRowGroup; }

}  // namespace quantized_linear
