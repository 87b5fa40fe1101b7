// The matrix of signs that the tensor cores apply.
#pragma once

#include "kernels/device.h"
#include "kernels/fast_hadamard.h"

namespace fast_hadamard {

// Entry (row, column) of the matrix that multiplies from the left: that of (base (x) Sylvester)^T, or zero
// between the repetitions along the diagonal and outside.
ROTEXPORT_DEVICE int matrix_entry(const Geometry& geometry, const device::Global<const int8_t>& base, int row,
                                  int column) {
  if (row >= geometry.order || column >= geometry.order) return 0;
  if ((row ^ column) & ~geometry.repeat_mask) return 0;
  const int shift = geometry.log_sylvester;
  const int i = column & geometry.repeat_mask;
  const int j = row & geometry.repeat_mask;
  const int sign = base.load<int8_t>((i >> shift) * geometry.base_order + (j >> shift));
  const auto common = static_cast<uint32_t>(i & j & ((1 << shift) - 1));
  return (sign < 0) != (device::population(common) % 2 == 1) ? -1 : 1;
}

}  // namespace fast_hadamard
