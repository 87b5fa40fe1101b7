// Instantiates prefill for one element type and head size: compiled once for each, with ROTEXPORT_ELEMENT and
// ROTEXPORT_SIZE defined.

#include "kernels/attention_launch.h"
#include "kernels/attention_prefill_kernel.h"

namespace sink_window_attention {
namespace {

template <class Element>
Held<Element> held(const void* slots, const void* fresh) {
  return {static_cast<const Element*>(slots), static_cast<const Element*>(fresh)};
}

// What `stage` wrote: rings, and behind them the call's tokens.
template <class Element>
Held<Element> staged(const Geometry& g, char* workspace, int64_t width) {
  const auto* rings = reinterpret_cast<const Element*>(workspace);
  return {rings, rings + int64_t{g.batch} * g.kv_heads * g.window * width};
}

}  // namespace

template <class Element, int kSize>
Status launch_prefill(const Plan& plan, const Operands& operands, void* stream) {
  using Traits = PrefillTraits<Element, kSize>;
  const Geometry& g = plan.geometry;
  const Cache& cache = operands.present;
  const bool coded = plan.problem.format != Format::kFloat;
  PrefillOperands<Element> views = {};
  views.query = static_cast<const Element*>(operands.query);
  views.query_sink = static_cast<const Element*>(operands.query_sink);
  views.keys[kSinks] = held<Element>(cache.sink_key, operands.key);
  views.values[kSinks] = held<Element>(cache.sink_value, operands.value);
  views.keys[kNear] = held<Element>(coded ? cache.recent_key : cache.window_key, operands.key);
  views.values[kNear] = held<Element>(coded ? cache.recent_value : cache.window_value, operands.value);
  if (coded) {
    auto* workspace = static_cast<char*>(operands.workspace);
    views.keys[kFar] = staged<Element>(g, workspace, g.head_size);
    views.values[kFar] = staged<Element>(g, workspace + plan.values_offset, g.value_size);
  }
  views.past_length = operands.past_length;
  views.new_length = operands.new_length;
  views.decay = operands.decay;
  views.output = static_cast<Element*>(operands.output);
  views.coded = coded;
  const auto blocks = static_cast<unsigned>(g.batch * g.kv_heads * g.row_tiles);
  return device::launch(prefill<Traits>, {blocks, Traits::kThreads, Traits::kSharedBytes},
                        static_cast<device::Stream>(stream), g, views);
}

template Status launch_prefill<ROTEXPORT_ELEMENT, ROTEXPORT_SIZE>(const Plan&, const Operands&, void*);

}  // namespace sink_window_attention
