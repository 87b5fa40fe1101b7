// Conversions of float8 numbers: beyond the vocabulary of device.h, for the kernels that store them.
#pragma once

#ifdef ROTEXPORT_EMULATOR
#  include "emulator/fp8_device.h"
#else
#  include "kernels/cuda_fp8_device.h"
#endif
