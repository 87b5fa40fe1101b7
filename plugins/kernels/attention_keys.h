// Which keys a query sees and where they are stored: shared by all kernels of sink/window attention.
#pragma once

#include "kernels/attention.h"
#include "kernels/device.h"

namespace sink_window_attention {

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

// Consecutive positions that are stored alike, and what sees them: i - j in [nearest, farthest).
struct Range {
  int first;
  int last;  // below first: empty
  int nearest;
  int farthest;

  ROTEXPORT_DEVICE int count() const { return last < first ? 0 : last - first + 1; }
  ROTEXPORT_DEVICE bool shows(int i, int j) const {
    return i - j >= nearest && i - j < farthest && j <= last;
  }
  // Whether queries i0 ... i1 all see keys j0 ... j1.
  ROTEXPORT_DEVICE bool shows_all(int i0, int i1, int j0, int j1) const {
    return i0 - j1 >= nearest && i1 - j0 < farthest && j1 <= last;
  }
};

// The ranges that queries i0 ... i1 see. Sinks are met by the queries of their own. Codes hold what is `far`;
// without codes `near` is the whole window.
enum Part : int { kSinks, kFar, kNear, kParts };

ROTEXPORT_DEVICE Range range_of(Part part, const Geometry& g, bool coded, int i0, int i1) {
  if (part == kSinks) return {0, (g.sinks <= i1 ? g.sinks : i1 + 1) - 1, 0, kForever};
  const bool far = part == kFar;
  const int nearest = far ? g.recent : 0;
  const int farthest = far || !coded ? g.window : g.recent;
  if (nearest == farthest || (far && !coded)) return {0, -1, 0, 0};
  const int first = i0 - farthest + 1;
  return {first < g.sinks ? g.sinks : first, i1 - nearest, nearest, farthest};
}

// Where positions are: those below `past` in slots, later ones in the call's own tensor.
struct Places {
  int past;
  int slots;
  int oldest;       // a position
  int oldest_slot;  // of it

  ROTEXPORT_DEVICE bool is_fresh(int j) const { return j >= past; }
  ROTEXPORT_DEVICE int token(int j) const { return j - past; }
  ROTEXPORT_DEVICE int slot(int j) const {
    const int straight = j - oldest + oldest_slot;
    return straight < slots ? straight : straight - slots;
  }
};

ROTEXPORT_DEVICE Places sink_places(int past, int sinks) { return {past, sinks, 0, 0}; }
// A ring of `slots`, after `past` tokens; asked only for positions from `sinks` on.
ROTEXPORT_DEVICE Places ring_places(int past, int sinks, int slots) {
  return {past, slots, past - slots, past < sinks ? 0 : (past - sinks) % slots};
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

}  // namespace sink_window_attention
