// What parts of the keys gave each query becomes its output.
#pragma once

#include "kernels/attention_queries.h"

namespace attention {

constexpr int kCombineWarps = 4;
constexpr int kCombineThreads = 32 * kCombineWarps;

// A thread block combines the parts of one packed query row; parts are added in a fixed order.
template <class Element>
class Combine {
 public:
  // Keeps each row's maximum and sum in `stats` [rows, 2], unless it is nullptr.
  ROTEXPORT_DEVICE Combine(const Geometry& g, const CallViews<Element>& call, const Parts<const float>& parts,
                           float* stats)
      : g_(g), call_(call), parts_(parts), stats_(stats), shared_(0) {}

  ROTEXPORT_DEVICE void run() const {
    const int64_t row = device::block_index();
    const int rows = g_.tokens * g_.repeat;
    const int head = static_cast<int>(row / rows);  // of keys
    const int packed = static_cast<int>(row % rows);
    const auto output =
        device::Global<Element>(call_.output).from(query_row(g_, head, packed) * g_.value_size);
    const Row lengths = load_row(call_.past_length, call_.new_length, head / g_.kv_heads, g_.tokens);
    if (packed / g_.repeat >= lengths.fresh) {
      for (int i = thread() * 2; i < g_.value_size; i += 2 * kCombineThreads) output.store(i, uint32_t{0});
      return;
    }
    add_parts(row);
    device::barrier();
    float total = 0;
    for (int w = 0; w < kCombineWarps; ++w) {
      total += shared_.template load<float>(kCombineWarps * kLargestHead + w);
    }
    for (int i = thread() * 2; i < g_.value_size; i += 2 * kCombineThreads) {
      Vector<float, 2> sum = {};
      for (int w = 0; w < kCombineWarps; ++w) {
        const auto part = shared_.template load<Vector<float, 2>>(w * kLargestHead + i);
        sum.values[0] += part.values[0];
        sum.values[1] += part.values[1];
      }
      output.store(i, device::pack<Element>(sum.values[0] / total, sum.values[1] / total));
    }
    if (stats_ != nullptr && thread() == 0) device::Global<float>(stats_).store(2 * row + 1, total);
  }

 private:
  static constexpr int kPieces = kLargestHead / 128;

  static ROTEXPORT_DEVICE int thread() { return static_cast<int>(device::thread_index()); }

  // Every warp takes every fourth part.
  ROTEXPORT_DEVICE void add_parts(int64_t row) const {
    const int lane = thread() % 32;
    const int warp = thread() / 32;
    const auto weights = device::Global<const float>(parts_.weights).from(row * g_.splits * 2);
    const auto sums = device::Global<const float>(parts_.sums).from(row * g_.splits * g_.value_size);
    float maximum = kHidden;
    for (int i = lane; i < g_.splits; i += 32) maximum = larger(maximum, weights.template load<float>(2 * i));
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      maximum = larger(maximum, device::shuffle_xor(maximum, lanes));
    }
    float total = 0;
    Vector<float, 4> sum[kPieces] = {};
    for (int part = warp; part < g_.splits; part += kCombineWarps) {
      const auto weight = weights.template load<Vector<float, 2>>(2 * part);
      const float factor = device::exp2(weight.values[0] - reference_of(maximum));
      total += weight.values[1] * factor;
      ROTEXPORT_UNROLL
      for (int piece = 0; piece < kPieces; ++piece) {
        const int column = 128 * piece + 4 * lane;
        if (column >= g_.value_size) continue;
        const auto values = sums.template load<Vector<float, 4>>(part * g_.value_size + column);
        ROTEXPORT_UNROLL
        for (int i = 0; i < 4; ++i) sum[piece].values[i] += values.values[i] * factor;
      }
    }
    ROTEXPORT_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      shared_.store(warp * kLargestHead + 128 * piece + 4 * lane, sum[piece]);
    }
    if (lane == 0) shared_.store(kCombineWarps * kLargestHead + warp, total);
    if (stats_ != nullptr && thread() == 0) device::Global<float>(stats_).store(2 * row, maximum);
  }

  const Geometry& g_;
  const CallViews<Element>& call_;
  const Parts<const float>& parts_;
  float* stats_;
  device::Shared<float> shared_;
};
constexpr unsigned kCombineShared = (kCombineWarps * kLargestHead + kCombineWarps) * sizeof(float);

}  // namespace attention
