// Conversions of float8e4m3fn numbers on a GPU.
#pragma once

#include "kernels/device.h"

namespace device {

// Whether an instruction makes numbers of type T of float8e4m3fn bytes, and what it makes of a word's: of the
// lower two the first pair, of the upper two the second.
template <class T>
constexpr bool kConvertsFp8 = false;
template <class T>
ROTEXPORT_DEVICE void convert_fp8(uint32_t (&pairs)[2], uint32_t bytes);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
template <>
constexpr bool kConvertsFp8<Half> = true;
template <>
ROTEXPORT_DEVICE void convert_fp8<Half>(uint32_t (&pairs)[2], uint32_t bytes) {
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(bytes));
}
#endif

}  // namespace device
