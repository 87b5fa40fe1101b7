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
  if (row / geometry.diagonal != column / geometry.diagonal) return 0;
  const int sylvester = geometry.diagonal / geometry.base_order;
  const int i = column % geometry.diagonal;
  const int j = row % geometry.diagonal;
  const int sign =
      base.load<int8_t>(static_cast<int64_t>(i / sylvester) * geometry.base_order + j / sylvester);
  const bool odd = device::population(static_cast<uint32_t>((i % sylvester) & (j % sylvester))) & 1;
  return (sign < 0) != odd ? -1 : 1;
}

}  // namespace fast_hadamard
