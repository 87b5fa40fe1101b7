// Instantiates the kernel for one format, for few or for many rows: compiled once for each, with
// ROTEXPORT_FORMAT and ROTEXPORT_DECODES defined.

#include "kernels/quantized_linear_kernel.h"
#include "kernels/quantized_linear_launch.h"

namespace quantized_linear {
namespace {

template <class Traits>
Status launch_with(const Plan& plan, const KernelOperands& operands, device::Stream stream) {
  const Geometry& g = plan.geometry;
  const auto blocks = static_cast<unsigned>(g.row_tiles) * g.column_tiles * g.splits;
  return device::launch(quantized_linear<Traits>, {blocks, Traits::kThreads, Traits::kSharedBytes}, stream, g,
                        operands);
}

}  // namespace

template <Format kFormat, bool kDecodes>
Status launch(const Plan& plan, const KernelOperands& operands, device::Stream stream) {
  switch (plan.scales) {
    case Scales::kChannel:
      return launch_with<Traits<kFormat, Scales::kChannel, kDecodes>>(plan, operands, stream);
    case Scales::kGroup:
      return launch_with<Traits<kFormat, Scales::kGroup, kDecodes>>(plan, operands, stream);
    case Scales::kRowGroup:
      return launch_with<Traits<kFormat, Scales::kRowGroup, kDecodes>>(plan, operands, stream);
    case Scales::kTwoLevel:
      if constexpr (kFormat != Format::kW8A8) {
        return launch_with<Traits<kFormat, Scales::kTwoLevel, kDecodes>>(plan, operands, stream);
      }
  }
  return {"QuantizedLinear: the plan names scales that were not compiled"};
}

template Status launch<Format::ROTEXPORT_FORMAT, ROTEXPORT_DECODES>(const Plan&, const KernelOperands&,
                                                                    device::Stream);

}  // namespace quantized_linear
