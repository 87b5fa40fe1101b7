// Products of 8-bit integers with many rows on Hopper's warpgroup instructions, where the library was built
// with CUTLASS (quantized_linear_hopper.cu).
#pragma once

#include "kernels/quantized_linear.h"

namespace quantized_linear {

// Whether the current device and the plan's shapes allow it.
bool hopper_takes(const Plan& plan);

Status run_hopper(const Plan& plan, const Operands& operands, void* stream);

// One for each type and with or without an ending, each compiled in a unit of its own.
template <class Element, bool kEnds>
Status launch_hopper(const Plan& plan, const Operands& operands, void* stream);

}  // namespace quantized_linear
