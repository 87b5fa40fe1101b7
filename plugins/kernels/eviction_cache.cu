// Instantiates what chooses and moves, for one element type: compiled once for each, with ROTEXPORT_ELEMENT
// defined.

#include "kernels/eviction_cache_kernel.h"
#include "kernels/eviction_choose_kernel.h"
#include "kernels/eviction_launch.h"
#include "kernels/eviction_recall_kernel.h"
#include "kernels/eviction_views.h"

namespace eviction {

template <class Element>
Status launch_combine(const Plan& plan, const Operands& operands, void* stream) {
  const Geometry& g = plan.geometry;
  const auto blocks = static_cast<unsigned>(int64_t{g.batch} * g.query_heads * g.tokens);
  return device::launch(combine<Element>, {blocks, kCombineThreads, kCombineShared},
                        static_cast<device::Stream>(stream), g, views_of<Element>(plan, operands));
}

template <class Element>
Status launch_recall(const Plan& plan, const Operands& operands, void* stream) {
  const Geometry& g = plan.geometry;
  const auto blocks =
      static_cast<unsigned>(g.batch * g.kv_heads * tiles_of(g.window + g.tokens, kRecallThreads));
  return device::launch(recall<Element>, {blocks, kRecallThreads, kRecallShared},
                        static_cast<device::Stream>(stream), g, plan.rules,
                        views_of<Element>(plan, operands));
}

template <class Element>
Status launch_choose(const Plan& plan, const Operands& operands, void* stream) {
  const Geometry& g = plan.geometry;
  const auto blocks = static_cast<unsigned>(g.batch * g.kv_heads);
  return device::launch(choose<Element>, {blocks, kChooseThreads, Choose::kSharedBytes},
                        static_cast<device::Stream>(stream), g, plan.rules,
                        views_of<Element>(plan, operands));
}

template <class Element>
Status launch_store(const Plan& plan, const Operands& operands, void* stream) {
  const Geometry& g = plan.geometry;
  const int heads = g.batch * g.kv_heads;
  const auto moving = static_cast<unsigned>(heads * Store<Element>::blocks(g));
  const auto sinks = static_cast<unsigned>(tiles_of(2 * heads * g.sinks, kStoreThreads / 32));
  return device::launch(store<Element>, {moving + sinks, kStoreThreads, 0},
                        static_cast<device::Stream>(stream), g, views_of<Element>(plan, operands), moving);
}

template Status launch_combine<ROTEXPORT_ELEMENT>(const Plan&, const Operands&, void*);
template Status launch_recall<ROTEXPORT_ELEMENT>(const Plan&, const Operands&, void*);
template Status launch_choose<ROTEXPORT_ELEMENT>(const Plan&, const Operands&, void*);
template Status launch_store<ROTEXPORT_ELEMENT>(const Plan&, const Operands&, void*);

}  // namespace eviction
