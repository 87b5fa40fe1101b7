#include "kernels/attention_launch.h"
#include "kernels/attention_run.h"
#include "kernels/attention_sizes.h"

namespace sink_window_attention {
namespace {

template <class Element>
Status run_prefill(const Plan& plan, const Operands& operands, void* stream) {
#ifdef ROTEXPORT_WARPGROUPS
  if (plan.on_warpgroups) {
    return plan.size == 64 ? launch_warpgroup_prefill<Element, 64>(plan, operands, stream)
                           : launch_warpgroup_prefill<Element, 128>(plan, operands, stream);
  }
#endif
  return for_size(plan.size, [&](auto size) {
    return launch_prefill<Element, decltype(size)::value>(plan, operands, stream);
  });
}

// Prefill's plan for rows that go on behind the head's channels.
Plan extended(const Plan& plan) {
  Plan wide = plan;
  wide.geometry.head_size = plan.geometry.key_row;
  return wide;
}

template <class Element, Format kFormat>
Status run_with(const Plan& plan, const Operands& given, void* stream) {
  Operands read = given;
  Operands stored = given;
  Status status;
  if (arranges_rows(plan)) status = launch_rows<Element>(plan, given, read, stored, stream);
  if (status && plan.decodes) {
    if (plan.problem.angles > 0) status = launch_means<Element>(plan, given, stream);
    if (status) status = launch_decode<Element, kFormat>(plan, read, stream);
  } else if (status) {
    if constexpr (kFormat != Format::kFloat) {
      status = launch_stage<Element, kFormat>(plan, stored, stream);
    }
    if (status) status = run_prefill<Element>(extended(plan), read, stream);
  }
  // The only launch that writes the cache comes last.
  return status ? launch_finish<Element, kFormat>(plan, stored, stream) : status;
}

template <class Element>
Status run_element(const Plan& plan, const Operands& operands, void* stream) {
  switch (plan.problem.format) {
    case Format::kFloat:
      return run_with<Element, Format::kFloat>(plan, operands, stream);
    case Format::kInt8:
      return run_with<Element, Format::kInt8>(plan, operands, stream);
    case Format::kInt4:
      return run_with<Element, Format::kInt4>(plan, operands, stream);
    case Format::kInt2:
      return run_with<Element, Format::kInt2>(plan, operands, stream);
    case Format::kFp8:
      return run_with<Element, Format::kFp8>(plan, operands, stream);
  }
  return {"SinkWindowAttention: unknown cache format"};
}

}  // namespace

bool has_warpgroups() {
#ifdef ROTEXPORT_WARPGROUPS
  return device::has_warpgroups();
#else
  return false;
#endif
}

Status run(const Plan& plan, const Operands& operands, void* stream) {
  return run_in_place(plan, operands, stream,
                      [&](auto element) { return run_element<decltype(element)>(plan, operands, stream); });
}

}  // namespace sink_window_attention
