// Instantiates the kernel for one element type and output: compiled once for each, with ROTEXPORT_ELEMENT and
// ROTEXPORT_OUTPUT defined.

#include <algorithm>

#include "kernels/fast_hadamard_kernel.h"
#include "kernels/fast_hadamard_launch.h"

namespace fast_hadamard {
namespace {

// Enough thread blocks to keep every multiprocessor busy while the last ones finish; each then takes several
// units.
constexpr unsigned kBlocksPerMultiprocessor = 32;

template <class Traits>
Status launch_variant(const Plan& plan, const Operands& operands, device::Stream stream) {
  using Element = typename Traits::Element;
  KernelOperands<Traits> views;
  views.x = device::Global<const Element>(static_cast<const Element*>(operands.x));
  views.signs = device::Global<const Element>(static_cast<const Element*>(operands.signs));
  views.base = device::Global<const int8_t>(operands.base);
  views.packed_signs = device::Global<const uint32_t>(static_cast<const uint32_t*>(operands.workspace));
  views.y = device::Global<typename Traits::Result>(static_cast<typename Traits::Result*>(operands.y));
  views.scale = device::Global<float>(operands.scale);
  const unsigned most = std::max(1u, device::multiprocessors() * kBlocksPerMultiprocessor);
  const unsigned grid = std::min(plan.geometry.units, most);
  return device::launch(fast_hadamard<Traits>, {grid, plan.threads, plan.shared_bytes}, stream, plan.geometry,
                        views, plan.peak_bytes);
}

}  // namespace

template <class Element, Output kOutput>
Status launch(const Plan& plan, const Operands& operands, void* opaque_stream) {
  const auto stream = static_cast<device::Stream>(opaque_stream);
  if (plan.workspace_bytes > 0) {
    const Status packed = pack_matrix(plan, operands, opaque_stream);
    if (!packed) return packed;
  }
  const Variant& v = plan.variant;
#define ROTEXPORT_VARIANT(COLUMN_CLASS, ROW_TILES, COLUMN_TILES, EXCHANGE)                            \
  if (v.column_class == COLUMN_CLASS && v.row_tiles == ROW_TILES && v.column_tiles == COLUMN_TILES && \
      v.exchange == EXCHANGE) {                                                                       \
    return launch_variant<Traits<Element, kOutput, COLUMN_CLASS, ROW_TILES, COLUMN_TILES, EXCHANGE>>( \
        plan, operands, stream);                                                                      \
  }
  ROTEXPORT_VARIANT(0, 1, 1, 1)
  ROTEXPORT_VARIANT(1, 1, 1, 1)
  ROTEXPORT_VARIANT(2, 1, 1, 1)
  ROTEXPORT_VARIANT(3, 1, 1, 1)
  ROTEXPORT_VARIANT(3, 2, 1, 1)
  ROTEXPORT_VARIANT(3, 1, 2, 1)
  ROTEXPORT_VARIANT(3, 1, 2, 2)
  ROTEXPORT_VARIANT(3, 1, 2, 4)
  ROTEXPORT_VARIANT(3, 1, 2, 8)
  ROTEXPORT_VARIANT(3, 1, 2, 16)
#undef ROTEXPORT_VARIANT
  return {"FastHadamard: the plan names a variant that was not compiled"};
}

template Status launch<ROTEXPORT_ELEMENT, Output::ROTEXPORT_OUTPUT>(const Plan&, const Operands&, void*);

}  // namespace fast_hadamard
