// The vocabulary of Hopper's asynchronous instructions, beside that of kernels/device.h: only units that are
// compiled for sm_90a use it.
#pragma once

#include "kernels/device.h"

#ifdef ROTEXPORT_EMULATOR
#  include "emulator/warpgroup_device.h"
#else
#  include "kernels/cuda_warpgroup_device.h"
#endif
