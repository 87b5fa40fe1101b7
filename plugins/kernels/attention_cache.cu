// Instantiates what moves the cache for one element type: compiled once for each, with ROTEXPORT_ELEMENT
// defined.

#include "kernels/attention_cache_kernel.h"
#include "kernels/attention_launch.h"

namespace sink_window_attention {
namespace {

template <class Element>
CacheOperands<Element> views_of(const Plan& plan, const Operands& operands) {
  auto* workspace = static_cast<char*>(operands.workspace);
  CacheOperands<Element> views = {};
  set_views(views, operands);
  views.key_mean = static_cast<const Element*>(operands.key_mean);
  views.mean_angles = static_cast<const Element*>(operands.mean_angles);
  views.cache = operands.present;
  views.staged[0] = reinterpret_cast<Element*>(workspace);
  views.staged[1] = reinterpret_cast<Element*>(workspace + plan.values_offset);
  views.parts = {reinterpret_cast<const float*>(workspace),
                 reinterpret_cast<const float*>(workspace + plan.weights_offset)};
  return views;
}

unsigned blocks_of(int64_t errands) {
  return static_cast<unsigned>((errands + kCacheWarps - 1) / kCacheWarps);
}

}  // namespace

template <class Element, Format kFormat>
Status launch_stage(const Plan& plan, const Operands& operands, void* stream) {
  const Geometry& g = plan.geometry;
  const int64_t errands = int64_t{2} * g.batch * g.kv_heads * (g.window + g.tokens);
  return device::launch(stage<Element, kFormat>, {blocks_of(errands), kCacheThreads, 0},
                        static_cast<device::Stream>(stream), g, views_of<Element>(plan, operands), errands);
}

template <class Element, Format kFormat>
Status launch_finish(const Plan& plan, const Operands& operands, void* stream) {
  const Geometry& g = plan.geometry;
  const int items = g.sinks + ring_items(g.tokens, g.window) + ring_items(g.tokens, g.recent);
  const int64_t errands = int64_t{2} * g.batch * g.kv_heads * items;
  const unsigned combined =
      plan.decodes ? static_cast<unsigned>(int64_t{g.batch} * g.query_heads * g.tokens) : 0u;
  return device::launch(
      finish<Element, kFormat>, {combined + blocks_of(errands), kCacheThreads, combined ? kCombineShared : 0},
      static_cast<device::Stream>(stream), g, views_of<Element>(plan, operands), combined, errands);
}

#define ROTEXPORT_CACHE(FORMAT) \
  template Status launch_finish<ROTEXPORT_ELEMENT, Format::FORMAT>(const Plan&, const Operands&, void*);
#define ROTEXPORT_CODED_CACHE(FORMAT) \
  ROTEXPORT_CACHE(FORMAT)             \
  template Status launch_stage<ROTEXPORT_ELEMENT, Format::FORMAT>(const Plan&, const Operands&, void*);
ROTEXPORT_CACHE(kFloat)
ROTEXPORT_CODED_CACHE(kInt8)
ROTEXPORT_CODED_CACHE(kInt4)
ROTEXPORT_CODED_CACHE(kInt2)
ROTEXPORT_CODED_CACHE(kFp8)

}  // namespace sink_window_attention
