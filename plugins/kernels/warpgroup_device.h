// The vocabulary of Hopper's asynchronous instructions, beside that of kernels/device.h: only units that are
// compiled for sm_90a use it.
#pragma once

#include "kernels/device.h"

namespace device {

// A tensor [heads, head_rows, columns] of 16-bit elements in global memory. Tile copies see `rows` of each
// head: behind them are zeros.
struct TileTensor {
  const void* data;
  unsigned columns;
  unsigned rows;
  unsigned head_rows;
  unsigned heads;
};

}  // namespace device

#ifdef ROTEXPORT_EMULATOR
#  include "emulator/warpgroup_device.h"
#else
#  include "kernels/cuda_warpgroup_device.h"
#endif
