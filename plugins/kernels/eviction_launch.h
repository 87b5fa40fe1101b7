// One function per element type (and head size), each compiled in a unit of its own.
#pragma once

#include "kernels/eviction.h"

namespace eviction {

// Outputs, or parts of them, and what each query's softmax was divided by.
template <class Element, int kSize>
Status launch_attend(const Plan& plan, const Operands& operands, void* stream);

// What each token drew, and the norm of its value.
template <class Element, int kSize>
Status launch_mass(const Plan& plan, const Operands& operands, void* stream);

// What each token drew from few queries.
template <class Element>
Status launch_recall(const Plan& plan, const Operands& operands, void* stream);

// Outputs of their parts.
template <class Element>
Status launch_combine(const Plan& plan, const Operands& operands, void* stream);

// Which token goes to which slot.
template <class Element>
Status launch_choose(const Plan& plan, const Operands& operands, void* stream);

// Moves them there.
template <class Element>
Status launch_store(const Plan& plan, const Operands& operands, void* stream);

}  // namespace eviction
