#include "kernels/attention_launch.h"
#include "kernels/attention_sizes.h"
#include "kernels/device.h"

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
  switch (plan.size) {
    case 64:
      return launch_prefill<Element, 64>(plan, operands, stream);
    case 80:
      return launch_prefill<Element, 80>(plan, operands, stream);
    case 96:
      return launch_prefill<Element, 96>(plan, operands, stream);
    case 128:
      return launch_prefill<Element, 128>(plan, operands, stream);
    case 256:
      return launch_prefill<Element, 256>(plan, operands, stream);
  }
  return {"SinkWindowAttention: the plan names a size that was not compiled"};
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

// The kernels update a cache in place: one that is to end up elsewhere is copied there first.
Status copy_cache(const Plan& plan, const Operands& operands, void* stream) {
  size_t bytes[8];
  cache_bytes(plan.problem, bytes);
  const auto* from = reinterpret_cast<void* const*>(&operands.cache);
  const auto* to = reinterpret_cast<void* const*>(&operands.present);
  for (int i = 0; i < 8; ++i) {
    if (bytes[i] == 0 || from[i] == to[i]) continue;
    const Status copied = device::copy(to[i], from[i], bytes[i], static_cast<device::Stream>(stream));
    if (!copied) return copied;
  }
  return {};
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
  const Status copied = copy_cache(plan, operands, stream);
  if (!copied || plan.problem.batch == 0 || plan.problem.tokens == 0) return copied;
  switch (plan.problem.type) {
    case Type::kHalf:
      return run_element<device::Half>(plan, operands, stream);
    case Type::kBFloat16:
      return run_element<device::BFloat16>(plan, operands, stream);
  }
  return {"SinkWindowAttention: unknown element type"};
}

}  // namespace sink_window_attention
