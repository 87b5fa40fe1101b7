// Instantiates prefill for one element type and head size: compiled once for each, with ROTEXPORT_ELEMENT and
// ROTEXPORT_SIZE defined.

#include "kernels/attention_launch.h"
#include "kernels/attention_prefill_kernel.h"
#include "kernels/attention_prefill_views.h"

namespace sink_window_attention {

template <class Element, int kSize>
Status launch_prefill(const Plan& plan, const Operands& operands, void* stream) {
  using Traits = PrefillTraits<Element, kSize>;
  const Geometry& g = plan.geometry;
  const auto blocks = static_cast<unsigned>(g.batch * g.kv_heads * g.row_tiles);
  return device::launch(prefill<Traits>, {blocks, Traits::kThreads, Traits::kSharedBytes},
                        static_cast<device::Stream>(stream), g, prefill_views<Element>(plan, operands));
}

template Status launch_prefill<ROTEXPORT_ELEMENT, ROTEXPORT_SIZE>(const Plan&, const Operands&, void*);

}  // namespace sink_window_attention
