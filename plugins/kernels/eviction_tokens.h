// Which tokens there are besides the sinks, and where: shared by all kernels that evict.
#pragma once

#include "kernels/attention_keys.h"
#include "kernels/eviction.h"
#include "kernels/eviction_sizes.h"

namespace eviction {

using sink_window_attention::Curve;
using sink_window_attention::facts_of;
using sink_window_attention::kForever;
using sink_window_attention::kHidden;
using sink_window_attention::larger;
using sink_window_attention::largest_of_quad;
using sink_window_attention::load_row;
using sink_window_attention::reference_of;
using sink_window_attention::Row;
using sink_window_attention::RowFacts;
using sink_window_attention::sum_of_quad;

constexpr int kNone = -1;  // position of no token

// What one launch leaves for the next.
struct Scratch {
  float* sums;
  float* weights;
  float* stats;
  float* mass;
  float* norm;
  float* score;
  uint32_t* rank;
  int* source;
  int* position;
  float* kept;
  int* moves;
};

template <class Element>
struct Views {
  const Element* query;
  const Element* query_sink;
  const Element* key;
  const Element* value;
  const int32_t* past_length;
  const int32_t* new_length;
  const float* decay;
  Cache cache;
  Scratch scratch;
  Element* output;
};

// The tokens of one key head, which counts through the batch.
struct Tokens {
  Row row;
  int sinks;
  device::Global<const int> slots;  // 1 + position

  template <class Element>
  ROTEXPORT_DEVICE Tokens(const Geometry& g, const Views<Element>& views, int head)
      : row(load_row(views.past_length, views.new_length, head / g.kv_heads, g.tokens)),
        sinks(g.sinks),
        slots(device::Global<const int>(static_cast<const int*>(views.cache.window_position))
                  .from(int64_t{head} * g.window)) {}

  ROTEXPORT_DEVICE int end() const { return row.past + row.fresh; }
  // Positions, kNone where there is no token: autotuning may fill slots with anything.
  ROTEXPORT_DEVICE int held(int slot) const {
    const int count = slots.load<int>(slot);
    return count > sinks && count <= row.past ? count - 1 : kNone;
  }
  ROTEXPORT_DEVICE int fresh(int token) const {
    return token >= 0 && token < row.fresh && row.past + token >= sinks ? row.past + token : kNone;
  }
};

// What is left of attention after so many tokens.
ROTEXPORT_DEVICE float faded(const Rules& rules, int tokens) {
  return tokens == 0 ? 1.0f : device::exp2(static_cast<float>(tokens) * rules.log_forget);
}

}  // namespace eviction
