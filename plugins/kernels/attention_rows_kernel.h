// Queries and keys on their way to attention: transformed, or with further channels behind their own.
//
// Prefill from centered keys reads rows of head_size + angles channels: a query goes on with its mean query,
// a key of codes with its angles, all others with zeros. So the product of two rows is the logit, whatever
// the key is stored as, and the prefill kernels know nothing of means.
#pragma once

#include "kernels/attention_codes.h"

namespace sink_window_attention {

constexpr int kRowWarps = 4;
constexpr int kRowSources = 6;

// Rows [count, head_size], and where they go.
template <class Element>
struct RowSource {
  const Element* rows;
  const Element* tails;  // [count, angles]; nullptr: zeros
  Element* to;           // [count, width]
  int64_t count;
  int width;
  bool rotates;
};

template <class Element>
struct RowOperands {
  RowSource<Element> sources[kRowSources];
  const Element* signs;  // of the rotation, and its factor
  float factor;
};

// x H for a row of `width` channels, a power of two, eight to a lane; H is Sylvester's.
ROTEXPORT_DEVICE void transform(float (&x)[kLaneChannels], int lane, int width) {
  ROTEXPORT_UNROLL
  for (int apart = 1; apart < kLaneChannels; apart *= 2) {
    ROTEXPORT_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) {
      if (i & apart) continue;
      const float sum = x[i] + x[i + apart];
      x[i + apart] = x[i] - x[i + apart];
      x[i] = sum;
    }
  }
  for (int lanes = 1; lanes * kLaneChannels < width; lanes *= 2) {
    ROTEXPORT_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) {
      const float other = device::shuffle_xor(x[i], lanes);
      x[i] = lane & lanes ? other - x[i] : x[i] + other;
    }
  }
}

// Each warp moves a row.
template <class Element>
ROTEXPORT_KERNEL void __launch_bounds__(32 * kRowWarps)
    arrange_rows(Geometry g, RowOperands<Element> operands) {
  int64_t row = static_cast<int64_t>(device::block_index()) * kRowWarps + device::thread_index() / 32;
  RowSource<Element> source = operands.sources[0];
  ROTEXPORT_UNROLL
  for (int i = 1; i < kRowSources; ++i) {
    if (row < source.count) continue;
    row -= source.count;
    source = operands.sources[i];
  }
  if (row >= source.count) return;
  const int lane = static_cast<int>(device::thread_index() % 32);
  const int channel = lane * kLaneChannels;
  float x[kLaneChannels];
  load_channels(x, device::Global<const Element>(source.rows + row * g.head_size), lane, g.head_size);
  if (source.rotates) {
    float signs[kLaneChannels];
    load_channels(signs, device::Global<const Element>(operands.signs), lane, g.head_size);
    ROTEXPORT_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) x[i] *= signs[i];
    transform(x, lane, g.head_size);
    ROTEXPORT_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) x[i] *= operands.factor;
  }
  if (channel >= source.width) return;
  Vector<uint32_t, 4> words = pack_channels<Element>(x);
  if (channel >= g.head_size && source.tails != nullptr) {
    words = load_loose(source.tails + row * g.angles, channel - g.head_size, g.angles);
  }
  device::Global<Element>(source.to).from(row * source.width).store(channel, words);
}

}  // namespace sink_window_attention
