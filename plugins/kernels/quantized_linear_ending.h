// From a sum to y: scales, zero point, bias, residual or gate.
#pragma once

#include "kernels/quantized_linear_tile.h"

namespace quantized_linear {

struct Column {
  float scale;
  float sum;  // of the weights, for zero points
  float bias;
};

struct Row {
  float scale;
  float zero;
};

ROTEXPORT_DEVICE Column column_of(const Geometry& geometry, const KernelOperands& operands, int column) {
  Column loaded;
  loaded.scale = geometry.factor;
  if (!geometry.grouped) loaded.scale *= operands.weight_scale.load<float>(column);
  loaded.sum = geometry.asymmetric ? operands.weight_sum.load<float>(column) : 0.0f;
  loaded.bias = operands.bias.load<float>(column);
  return loaded;
}

ROTEXPORT_DEVICE Row row_of(const Geometry& geometry, const KernelOperands& operands, int row) {
  Row loaded;
  loaded.scale = geometry.row_scales == 1 ? operands.x_scale.load<float>(row) : 1.0f;
  loaded.zero = geometry.asymmetric ? operands.x_zero.load<float>(row) : 0.0f;
  return loaded;
}

ROTEXPORT_DEVICE float scaled(float sum, const Row& row, const Column& column) {
  return (sum * column.scale - row.zero * column.sum) * row.scale + column.bias;
}

ROTEXPORT_DEVICE float ended(Ending ending, float value, float other) {
  constexpr float kLog2E = 1.44269504f;
  if (ending == Ending::kResidual) return value + other;
  if (ending == Ending::kGate)
    return value * other * device::reciprocal(1.0f + device::exp2(-other * kLog2E));
  return value;
}

template <class Element>
ROTEXPORT_DEVICE void end_narrow(const Geometry& geometry, const KernelOperands& operands, uint32_t index,
                                 bool pair, float (&values)[2]) {
  if (geometry.ending != Ending::kNone) {
    const uint32_t others =
        pair ? operands.narrow_other.load<uint32_t>(index) : operands.narrow_other.load<uint16_t>(index);
    values[0] = ended(geometry.ending, values[0], device::low_of<Element>(others));
    values[1] = ended(geometry.ending, values[1], device::high_of<Element>(others));
  }
  const uint32_t packed = device::pack<Element>(values[0], values[1]);
  if (pair) {
    operands.narrow_y.store(index, packed);
  } else {
    operands.narrow_y.store(index, static_cast<uint16_t>(packed));
  }
}

ROTEXPORT_DEVICE void end_wide(const Geometry& geometry, const KernelOperands& operands, uint32_t index,
                               bool pair, float (&values)[2]) {
  using Pair = Vector<float, 2>;
  if (geometry.ending != Ending::kNone) {
    Pair others = {};
    if (pair) {
      others = operands.wide_other.load<Pair>(index);
    } else {
      others.values[0] = operands.wide_other.load<float>(index);
    }
    for (int i = 0; i < 2; ++i) values[i] = ended(geometry.ending, values[i], others.values[i]);
  }
  if (pair) {
    operands.wide_y.store(index, Pair{values[0], values[1]});
  } else {
    operands.wide_y.store(index, values[0]);
  }
}

// Ends and stores y[index] and, when `pair`, its right neighbour; index is then even.
ROTEXPORT_DEVICE void end_and_store(const Geometry& geometry, const KernelOperands& operands, uint32_t index,
                                    bool pair, float first, float second) {
  float values[2] = {first, second};
  switch (geometry.type) {
    case Type::kHalf:
      return end_narrow<device::Half>(geometry, operands, index, pair, values);
    case Type::kBFloat16:
      return end_narrow<device::BFloat16>(geometry, operands, index, pair, values);
    case Type::kFloat:
      return end_wide(geometry, operands, index, pair, values);
  }
}

}  // namespace quantized_linear
