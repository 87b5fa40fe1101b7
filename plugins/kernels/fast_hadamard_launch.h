// One function per element type and output, each compiled in a unit of its own (fast_hadamard.cu).
#pragma once

#include "kernels/fast_hadamard.h"

namespace fast_hadamard {

// Writes the packed signs of the plan's matrix to the workspace.
Status pack_matrix(const Plan& plan, const Operands& operands, void* stream);

template <class Element, Output kOutput>
Status launch(const Plan& plan, const Operands& operands, void* stream);

}  // namespace fast_hadamard
