// What kernels are written in: one vocabulary, implemented for the GPU and for the emulator.
//
// A kernel reaches memory only through Global and Shared, and threads, barriers, shuffles, atomics and matrix
// instructions only through the functions of namespace `device`; so the same source runs in both, and the
// emulator sees every access.
#pragma once

#ifdef ROTEXPORT_EMULATOR
#  include "emulator/device.h"
#else
#  include "kernels/cuda_device.h"
#endif
