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
  set_views(views, operands);
  views.cache = operands.present;
  views.scratch = {{floats(at.sums), floats(at.weights)},
                   floats(at.stats),
                   plan.few ? floats(at.logits) : nullptr,
                   floats(at.mass),
                   floats(at.norm),
                   floats(at.score),
                   reinterpret_cast<uint32_t*>(workspace + at.rank),
                   ints(at.source),
                   ints(at.position),
                   floats(at.kept),
                   ints(at.moves)};
  return views;
}

}  // namespace eviction
