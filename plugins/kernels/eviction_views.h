// The operands of a plan as the kernels take them.
#pragma once

#include "kernels/eviction_tokens.h"

namespace eviction {

template <class Element>
Views<Element> views_of(const Plan& plan, const Operands& operands) {
  auto* workspace = static_cast<char*>(operands.workspace);
  const auto floats = [&](size_t offset) { return reinterpret_cast<float*>(workspace + offset); };
  const auto ints = [&](size_t offset) { return reinterpret_cast<int*>(workspace + offset); };
  const Offsets& at = plan.offsets;
  Views<Element> views = {};
  views.query = static_cast<const Element*>(operands.query);
  views.query_sink = static_cast<const Element*>(operands.query_sink);
  views.key = static_cast<const Element*>(operands.key);
  views.value = static_cast<const Element*>(operands.value);
  views.past_length = operands.past_length;
  views.new_length = operands.new_length;
  views.decay = operands.decay;
  views.cache = operands.present;
  views.scratch = {
      floats(at.sums), floats(at.weights), floats(at.stats), plan.few ? floats(at.logits) : nullptr,
      floats(at.mass), floats(at.norm),    floats(at.score), reinterpret_cast<uint32_t*>(workspace + at.rank),
      ints(at.source), ints(at.position),  floats(at.kept),  ints(at.moves)};
  views.output = static_cast<Element*>(operands.output);
  return views;
}

}  // namespace eviction
