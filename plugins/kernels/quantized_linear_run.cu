// Chooses the unit that runs a plan, and adds up the sums of splits.

#include "kernels/quantized_linear_ending.h"
#include "kernels/quantized_linear_hopper.h"
#include "kernels/quantized_linear_launch.h"

namespace quantized_linear {
namespace {

constexpr unsigned kCombineThreads = 256;

// y from the sums of all splits, added in their order. Neighbouring threads end neighbouring columns.
template <class Sum>
ROTEXPORT_KERNEL void combine(Geometry geometry, KernelOperands operands) {
  const uint32_t index = device::block_index() * device::block_size() + device::thread_index();
  const uint32_t count = static_cast<uint32_t>(geometry.rows) * geometry.outputs;
  if (index >= count) return;
  Sum sum = 0;
  for (int split = 0; split < geometry.splits; ++split) {
    const auto partial = operands.partial.from(static_cast<int64_t>(split) * count);
    sum += partial.template load<Sum>(index);
  }
  const int row = static_cast<int>(index / geometry.outputs);
  const int column = static_cast<int>(index % geometry.outputs);
  const float value =
      scaled(static_cast<float>(sum), row_of(geometry, operands, row), column_of(geometry, operands, column));
  end_and_store(geometry, operands, index, false, value, 0.0f);
}

KernelOperands views_of(const Operands& operands) {
  KernelOperands views;
  views.x = operands.x;
  views.weight = operands.weight;
  views.x_scale = device::Global<const float>(operands.x_scale);
  views.x_zero = device::Global<const float>(operands.x_zero);
  views.row_scale = operands.x_scale;
  views.group_scale = operands.weight_scale;
  views.factors = operands.factors;
  views.single_factors = device::Global<const int8_t>(operands.factors);
  views.weight_scale = device::Global<const float>(operands.weight_scale);
  views.weight_sum = device::Global<const float>(operands.weight_sum);
  views.bias = device::Global<const float>(operands.bias);
  views.narrow_other = device::Global<const uint16_t>(static_cast<const uint16_t*>(operands.other));
  views.wide_other = device::Global<const float>(static_cast<const float*>(operands.other));
  views.narrow_y = device::Global<uint16_t>(static_cast<uint16_t*>(operands.y));
  views.wide_y = device::Global<float>(static_cast<float*>(operands.y));
  views.partial = device::Global<uint32_t>(static_cast<uint32_t*>(operands.workspace));
  return views;
}

template <bool kDecodes>
Status launch_format(const Plan& plan, const KernelOperands& operands, device::Stream stream) {
  switch (plan.problem.format) {
    case Format::kW8A8:
      return launch<Format::kW8A8, kDecodes>(plan, operands, stream);
    case Format::kW4A8:
      return launch<Format::kW4A8, kDecodes>(plan, operands, stream);
    case Format::kW4A4:
      return launch<Format::kW4A4, kDecodes>(plan, operands, stream);
  }
  return {"QuantizedLinear: unknown format"};
}

}  // namespace

unsigned multiprocessors() { return device::multiprocessors(); }

Status run(const Plan& plan, const Operands& operands, void* opaque_stream) {
  const Geometry& g = plan.geometry;
  if (g.rows == 0) return {};
#ifdef ROTEXPORT_HOPPER
  if (hopper_takes(plan)) return run_hopper(plan, operands, opaque_stream);
#endif
  const auto stream = static_cast<device::Stream>(opaque_stream);
  const KernelOperands views = views_of(operands);
  const Status done =
      plan.decodes ? launch_format<true>(plan, views, stream) : launch_format<false>(plan, views, stream);
  if (!done || g.splits == 1) return done;
  const auto count = static_cast<unsigned>(g.rows) * g.outputs;
  const device::LaunchShape shape{(count + kCombineThreads - 1) / kCombineThreads, kCombineThreads, 0};
  return device::launch(g.grouped ? combine<float> : combine<int32_t>, shape, stream, g, views);
}

}  // namespace quantized_linear
