// An instantiation of the kernel: what a thread block holds, and how it is laid out in shared memory.
#pragma once

#include <type_traits>

#include "kernels/device.h"
#include "kernels/quantized_linear_shape.h"

namespace quantized_linear {

template <Format kFormat, Scales kScales, bool kDecodes>
using ShapeFor = std::conditional_t<kDecodes, DecodeShape<kFormat>,
                                    std::conditional_t<is_grouped(kScales), GroupPrefillShape, PrefillShape>>;

template <Format kFormat_, Scales kScales_, bool kDecodes_>
struct Traits : ShapeFor<kFormat_, kScales_, kDecodes_> {
  using Base = ShapeFor<kFormat_, kScales_, kDecodes_>;
  static constexpr Format kFormat = kFormat_;
  static constexpr Scales kScales = kScales_;
  static constexpr bool kDecodes = kDecodes_;
  static constexpr bool kGrouped = is_grouped(kScales);
  static constexpr int kXBits = kFormat == Format::kW4A4 ? 4 : 8;
  static constexpr int kWeightBits = kFormat == Format::kW8A8 ? 8 : 4;
  using Sum = std::conditional_t<kGrouped, float, int32_t>;  // of all groups

  // Rows of a tile lie slice by slice, so that the lanes of a warp, each with its part of a row, read
  // neighbouring bytes; the gap between slices spreads the chunks of one row over the banks as they arrive.
  static constexpr int kGap = 64;
  static constexpr int kXSliceBytes = kSlice * kXBits / 8;
  static constexpr int kWeightSliceBytes = kSlice * kWeightBits / 8;
  static constexpr int kXStep = Base::kRows * kXSliceBytes + kGap;
  static constexpr int kWeightStep = Base::kColumns * kWeightSliceBytes + kGap;
  static constexpr int kWeightOffset = Base::kSlices * kXStep;
  static constexpr int kScaleOffset = kWeightOffset + Base::kSlices * kWeightStep;
  // For each slice: factors of the tile's columns, a byte each, or scales of its columns and then of its
  // rows.
  static constexpr int kScaleBytes = kScales == Scales::kTwoLevel   ? Base::kColumns
                                     : kScales == Scales::kGroup    ? 4 * Base::kColumns
                                     : kScales == Scales::kRowGroup ? 4 * (Base::kColumns + Base::kRows)
                                                                    : 0;
  static constexpr int kStageBytes = kScaleOffset + Base::kSlices * kScaleBytes;
  static constexpr int kPipelineBytes = Base::kStages * kStageBytes;
  static constexpr int kExchangeBytes = (Base::kWarpDepth - 1) * Base::kRows * Base::kColumns * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kExchangeBytes ? kPipelineBytes : kExchangeBytes;

  static_assert(!kGrouped || Base::kSlices * kScaleBytes / 4 % Base::kThreads == 0,
                "every thread copies as many scales");
  static_assert(kSharedBytes <= 99 * 1024, "the shared memory of the smallest architecture");
  static_assert(kScales != Scales::kTwoLevel || kWeightBits == 4, "factors widen 4-bit integers");
};

struct KernelOperands {
  const int8_t* x;
  const int8_t* weight;
  device::Global<const float> x_scale;
  device::Global<const float> x_zero;
  const float* row_scale;  // x_scale and weight_scale again, for asynchronous copies
  const float* group_scale;
  const int8_t* factors;
  device::Global<const int8_t> single_factors;
  device::Global<const float> weight_scale;
  device::Global<const float> weight_sum;
  device::Global<const float> bias;
  device::Global<const uint16_t> narrow_other;  // one of the two views of what has type Geometry::type
  device::Global<const float> wide_other;
  device::Global<uint16_t> narrow_y;
  device::Global<float> wide_y;
  device::Global<uint32_t> partial;  // [splits, rows, outputs]: sums, int32 or float32
};

}  // namespace quantized_linear
