// One function per format, scales and kernel, compiled in units of their own (quantized_linear.cu).
#pragma once

#include "kernels/quantized_linear_tile.h"

namespace quantized_linear {

// Launches the kernel that a plan names; its sums are final when the plan has one split.
template <Format kFormat, bool kDecodes>
Status launch(const Plan& plan, const KernelOperands& operands, device::Stream stream);

}  // namespace quantized_linear
