// Which tokens there are besides the sinks, and where: shared by all kernels that evict.
#pragma once

#include "kernels/attention_queries.h"
#include "kernels/eviction.h"
#include "kernels/eviction_sizes.h"

namespace eviction {

constexpr int kNone = -1;  // position of no token

// What one launch leaves for the next.
struct Scratch {
  Parts<float> parts;
  float* stats;
  float* logits;  // nullptr: not kept
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
struct Views : CallViews<Element> {
  Cache cache;
  Scratch scratch;
};

// The tokens of one key head, which counts through the batch.
struct Tokens {
  Row row;
  int sinks;
  device::Global<const int> slots;  // 1 + position

  template <class Element>
  ROTEXPORT_DEVICE Tokens(const Geometry& g, const Views<Element>& views, int head)
      : Tokens(g, views, head, load_row(views.past_length, views.new_length, head / g.kv_heads, g.tokens)) {}

  template <class Element>
  ROTEXPORT_DEVICE Tokens(const Geometry& g, const Views<Element>& views, int head, const Row& known)
      : row(known),
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

template <class Element>
ROTEXPORT_DEVICE float sum_of_squares(const Vector<uint32_t, 4>& words) {
  float sum = 0;
  ROTEXPORT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float low = device::low_of<Element>(words.values[i]);
    const float high = device::high_of<Element>(words.values[i]);
    sum += low * low + high * high;
  }
  return sum;
}

// Over the eight lanes that share a token.
ROTEXPORT_DEVICE float sum_of_eight(float value) {
  for (int lanes = 1; lanes < 8; lanes *= 2) value += device::shuffle_xor(value, lanes);
  return value;
}

// Of a query row: its weight of a logit is count * 2^(logit - maximum).
struct alignas(16) QueryFacts {
  int position;
  float slope;
  float maximum;
  float count;
};

// What is left of attention after so many tokens.
ROTEXPORT_DEVICE float faded(const Rules& rules, int tokens) {
  return tokens == 0 ? 1.0f : device::exp2(static_cast<float>(tokens) * rules.log_forget);
}

// Whether queries of the call count at position `i`.
ROTEXPORT_DEVICE bool is_counted(const Rules& rules, const Tokens& tokens, int i) {
  if (rules.policy == Policy::kHeavyHitter) return true;
  return tokens.row.past == 0 && tokens.end() - i <= rules.observe;
}

// Of packed row `row` of a key head, from what attention left.
template <class Element>
ROTEXPORT_DEVICE QueryFacts query_facts(const Geometry& g, const Rules& rules, const Views<Element>& views,
                                        const Tokens& tokens, int head, int row) {
  const RowFacts facts = facts_of(g, views.decay, tokens.row.past, head, row);
  const auto stats = device::Global<const float>(views.scratch.stats)
                         .from((int64_t{head} * g.tokens * g.repeat + row) * 2)
                         .template load<Vector<float, 2>>(0);
  const bool fades = rules.policy == Policy::kHeavyHitter;
  const float importance = fades ? faded(rules, tokens.end() - 1 - facts.position) : 1.0f;
  return {facts.position, facts.slope, reference_of(stats.values[0]), importance / stats.values[1]};
}

}  // namespace eviction
