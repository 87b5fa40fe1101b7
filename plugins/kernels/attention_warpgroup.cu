// Instantiates prefill on warpgroups for one element type and head size: compiled for sm_90a alone, once for
// each, with ROTEXPORT_ELEMENT and ROTEXPORT_SIZE defined.

#include "kernels/attention_launch.h"
#include "kernels/attention_prefill_views.h"
#include "kernels/attention_warpgroup_kernel.h"

namespace sink_window_attention {
namespace {

// Slots of a part per (row of the batch, key head).
int slots_of(const Geometry& g, Part part, bool coded) {
  if (part == kSinks) return g.sink_slots;
  return part == kFar || !coded ? g.window : g.recent;
}

template <class Traits, class Element>
Status map_tensors(const Geometry& g, const PrefillOperands<Element>& views, TileMaps& maps) {
  const auto heads = static_cast<unsigned>(g.batch * g.kv_heads);
  for (const Kind kind : {kKeyTiles, kValueTiles}) {
    const auto width = static_cast<unsigned>(kind == kKeyTiles ? g.head_size : g.value_size);
    for (const Part part : {kSinks, kFar, kNear}) {
      const Held<Element>& held = (kind == kKeyTiles ? views.keys : views.values)[part];
      const auto slots = static_cast<unsigned>(slots_of(g, part, views.coded));
      const auto fresh = static_cast<unsigned>(shown_tokens(g, part));
      const auto tokens = static_cast<unsigned>(g.tokens);
      const device::TileTensor tensors[2] = {{held.slots, width, slots, slots, heads},
                                             {held.fresh, width, fresh, tokens, heads}};
      for (int i = 0; i < 2; ++i) {
        if (tensors[i].data == nullptr || tensors[i].rows == 0) continue;  // the format has no such part
        const Status made = device::make_tile_map(maps.tensors[kind][part][i], tensors[i], Traits::kKeys);
        if (!made) return made;
      }
    }
  }
  return {};
}

}  // namespace

template <class Element, int kSize>
Status launch_warpgroup_prefill(const Plan& plan, const Operands& operands, void* stream) {
  using Traits = WarpgroupTraits<Element, kSize>;
  const Geometry& g = plan.geometry;
  const PrefillOperands<Element> views = prefill_views<Element>(plan, operands);
  TileMaps maps = {};
  const Status mapped = map_tensors<Traits>(g, views, maps);
  if (!mapped) return mapped;
  const auto blocks = static_cast<unsigned>(g.batch * g.kv_heads * g.row_tiles);
  return device::launch(warpgroup_prefill<Traits>, {blocks, Traits::kThreads, Traits::kSharedBytes},
                        static_cast<device::Stream>(stream), g, views, maps);
}

template Status launch_warpgroup_prefill<ROTEXPORT_ELEMENT, ROTEXPORT_SIZE>(const Plan&, const Operands&,
                                                                            void*);

}  // namespace sink_window_attention
