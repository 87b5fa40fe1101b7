// Instantiates what multiplies queries and keys, for one element type and head size: compiled once for each,
// with ROTEXPORT_ELEMENT and ROTEXPORT_SIZE defined.

#include "kernels/eviction_attend_kernel.h"
#include "kernels/eviction_launch.h"
#include "kernels/eviction_mass_kernel.h"
#include "kernels/eviction_views.h"

namespace eviction {

template <class Element, int kSize>
Status launch_attend(const Plan& plan, const Operands& operands, void* stream) {
  using Traits = AttendTraits<Element, kSize>;
  const Geometry& g = plan.geometry;
  const auto blocks = static_cast<unsigned>(g.batch * g.kv_heads * g.row_tiles * g.splits);
  return device::launch(attend<Traits>, {blocks, Traits::kThreads, Traits::kSharedBytes},
                        static_cast<device::Stream>(stream), g, plan.rules,
                        views_of<Element>(plan, operands));
}

template <class Element, int kSize>
Status launch_mass(const Plan& plan, const Operands& operands, void* stream) {
  using Traits = MassTraits<Element, kSize>;
  const Geometry& g = plan.geometry;
  const int tiles = tiles_of(g.window, Traits::kKeys) + tiles_of(g.tokens, Traits::kKeys);
  const auto blocks = static_cast<unsigned>(g.batch * g.kv_heads * tiles);
  return device::launch(mass<Traits>, {blocks, Traits::kThreads, Traits::kSharedBytes},
                        static_cast<device::Stream>(stream), g, plan.rules,
                        views_of<Element>(plan, operands));
}

template Status launch_attend<ROTEXPORT_ELEMENT, ROTEXPORT_SIZE>(const Plan&, const Operands&, void*);
template Status launch_mass<ROTEXPORT_ELEMENT, ROTEXPORT_SIZE>(const Plan&, const Operands&, void*);

}  // namespace eviction
