// What the kernels of attention operators know of a call's queries and do with their logits.
#pragma once

#include "kernels/attention_call.h"
#include "kernels/device.h"

namespace attention {

constexpr int kForever = 0x7fffffff;
constexpr int kLongestStream = 1 << 30;

// One row of the batch.
struct Row {
  int past;
  int fresh;
};

// Lengths are clamped to what the tensors hold: a builder may time kernels on garbage.
ROTEXPORT_DEVICE Row load_row(const int32_t* past_length, const int32_t* new_length, int row, int tokens) {
  Row loaded;
  const int past = device::Global<const int32_t>(past_length).load<int32_t>(row);
  const int fresh = device::Global<const int32_t>(new_length).load<int32_t>(row);
  loaded.past = past < 0 ? 0 : past > kLongestStream ? kLongestStream : past;
  loaded.fresh = fresh < 0 ? 0 : fresh > tokens ? tokens : fresh;
  return loaded;
}

// Of a query row: kept in shared memory, since not every tile needs it. The slope is the decay in log2.
struct alignas(8) RowFacts {
  int position;
  float slope;
};

// Logits in units of log2, as the softmax takes them.
struct Curve {
  static constexpr float kLog2E = 1.4426950408889634f;

  float factor;  // of the product
  float cap;     // 0: none

  ROTEXPORT_DEVICE explicit Curve(const Geometry& g)
      : factor(g.softcap > 0 ? g.scale / g.softcap * (2 * kLog2E) : g.scale * kLog2E),
        cap(g.softcap * kLog2E) {}
  // tanh(x) = 1 - 2 / (1 + e^2x), right in both limits.
  ROTEXPORT_DEVICE float operator()(float product) const {
    const float x = product * factor;
    return cap > 0 ? cap - 2 * cap * device::reciprocal(1 + device::exp2(x)) : x;
  }
};

// Of packed row `row` of a key head, which counts through the batch.
ROTEXPORT_DEVICE RowFacts facts_of(const Geometry& g, const float* decay, int past, int head, int row) {
  const device::Global<const float> slopes(decay);
  return {past + row / g.repeat,
          Curve::kLog2E * slopes.load<float>(head % g.kv_heads * g.repeat + row % g.repeat)};
}

// Index of packed row `row` of a key head among the rows of queries and outputs.
ROTEXPORT_DEVICE int64_t query_row(const Geometry& g, int head, int row) {
  return (int64_t{head} * g.repeat + row % g.repeat) * g.tokens + row / g.repeat;
}

constexpr float kHidden = -__builtin_huge_valf();

ROTEXPORT_DEVICE float larger(float a, float b) { return fmaxf(a, b); }

// What exponents are taken against: a row that has seen nothing has a maximum of -infinity.
ROTEXPORT_DEVICE float reference_of(float maximum) { return maximum == kHidden ? 0.0f : maximum; }

// Over the four lanes that share a row of a matrix fragment.
ROTEXPORT_DEVICE float largest_of_quad(float value) {
  value = larger(value, device::shuffle_xor(value, 1));
  return larger(value, device::shuffle_xor(value, 2));
}
ROTEXPORT_DEVICE float sum_of_quad(float value) {
  value += device::shuffle_xor(value, 1);
  return value + device::shuffle_xor(value, 2);
}

}  // namespace attention
