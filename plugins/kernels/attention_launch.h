// One function per element type (and format or size), each compiled in a unit of its own.
#pragma once

#include "kernels/attention.h"

namespace sink_window_attention {

template <class Element, int kSize>
Status launch_prefill(const Plan& plan, const Operands& operands, void* stream);

// The same on Hopper's warpgroup instructions, in libraries that were built for them.
template <class Element, int kSize>
Status launch_warpgroup_prefill(const Plan& plan, const Operands& operands, void* stream);

template <class Element, Format kFormat>
Status launch_decode(const Plan& plan, const Operands& operands, void* stream);

// Rotates queries and keys, and extends them for prefill from centered keys, into the workspace: the call's
// operands become what attention reads, and what is stored.
template <class Element>
Status launch_rows(const Plan& plan, const Operands& given, Operands& read, Operands& stored, void* stream);

// Multiplies mean queries with angles into the workspace, for decoding from centered keys.
template <class Element>
Status launch_means(const Plan& plan, const Operands& operands, void* stream);

// Widens codes into the workspace, for prefill.
template <class Element, Format kFormat>
Status launch_stage(const Plan& plan, const Operands& operands, void* stream);

// Combines what decoding left in the workspace, and stores the call's tokens.
template <class Element, Format kFormat>
Status launch_finish(const Plan& plan, const Operands& operands, void* stream);

}  // namespace sink_window_attention
