// A call's operands as prefill kernels take them.
#pragma once

#include "kernels/attention_prefill_block.h"

namespace sink_window_attention {

template <class Element>
Held<Element> held_view(const void* slots, const void* fresh) {
  return {static_cast<const Element*>(slots), static_cast<const Element*>(fresh)};
}

// What `stage` wrote: rings, and behind them the call's tokens.
template <class Element>
Held<Element> staged_view(const Geometry& g, char* workspace, int64_t width) {
  const auto* rings = reinterpret_cast<const Element*>(workspace);
  return {rings, rings + int64_t{g.batch} * g.kv_heads * g.window * width};
}

template <class Element>
PrefillOperands<Element> prefill_views(const Plan& plan, const Operands& operands) {
  const Geometry& g = plan.geometry;
  const Cache& cache = operands.present;
  const bool coded = plan.problem.format != Format::kFloat;
  PrefillOperands<Element> views = {};
  set_views(views, operands);
  views.keys[kSinks] = held_view<Element>(cache.sink_key, operands.key);
  views.values[kSinks] = held_view<Element>(cache.sink_value, operands.value);
  views.keys[kNear] = held_view<Element>(coded ? cache.recent_key : cache.window_key, operands.key);
  views.values[kNear] = held_view<Element>(coded ? cache.recent_value : cache.window_value, operands.value);
  if (coded) {
    auto* workspace = static_cast<char*>(operands.workspace);
    views.keys[kFar] = staged_view<Element>(g, workspace, g.head_size);
    views.values[kFar] = staged_view<Element>(g, workspace + plan.values_offset, g.value_size);
  }
  views.coded = coded;
  return views;
}

}  // namespace sink_window_attention
