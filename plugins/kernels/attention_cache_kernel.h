// What happens to the cache around attention: codes are widened for prefill, partial results of decoding are
// combined, and, last of all, the call's tokens are stored.
#pragma once

#include "kernels/attention_codes.h"
#include "kernels/attention_combine.h"
#include "kernels/attention_keys.h"

namespace sink_window_attention {

constexpr int kCacheWarps = kCombineWarps;
constexpr int kCacheThreads = 32 * kCacheWarps;

template <class Element>
struct CacheOperands : CallViews<Element> {
  const Element* key_mean;     // nullptr: keys are not centered
  const Element* mean_angles;  // behind the channels of staged keys
  Cache cache;
  Element* staged[2];  // keys, values: [batch, kv_heads, window, row], then [batch, kv_heads, tokens, row]
  Parts<const float> parts;
};

// A token of keys or values to be moved by a warp.
struct Errand {
  int batch;
  int head;
  int64_t cache_head;
  bool value;
  int item;
};

// Errands are numbered by row of the batch, key head, keys or values, and then `items`.
ROTEXPORT_DEVICE Errand errand_of(const Geometry& g, int64_t number, int items) {
  Errand errand;
  errand.item = static_cast<int>(number % items);
  number /= items;
  errand.value = number % 2 != 0;
  errand.cache_head = number / 2;
  errand.batch = static_cast<int>(errand.cache_head / g.kv_heads);
  errand.head = static_cast<int>(errand.cache_head % g.kv_heads);
  return errand;
}

ROTEXPORT_DEVICE int64_t warp_number() {
  return static_cast<int64_t>(device::block_index()) * kCacheWarps + device::thread_index() / 32;
}

// A lane's codes with the scale of their group, as values.
template <class Element, Format kFormat>
ROTEXPORT_DEVICE void widen_channels(float (&x)[kLaneChannels], const LaneCodes& made) {
  const float step = device::low_of<Element>(made.scale);
  if constexpr (kFormat == Format::kFp8) {
    ROTEXPORT_UNROLL
    for (int word = 0; word < 2; ++word) {
      uint32_t pairs[2];
      widen_fp8<Element>(pairs, made.codes[word]);
      ROTEXPORT_UNROLL
      for (int i = 0; i < 2; ++i) {
        x[4 * word + i] = device::low_of<Element>(pairs[i]) * step;
        x[4 * word + 2 + i] = device::high_of<Element>(pairs[i]) * step;
      }
    }
  } else {
    constexpr int kBits = bits_of(kFormat);
    const float minimum = device::high_of<Element>(made.scale);
    ROTEXPORT_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) {
      const uint32_t code = made.codes[i * kBits / 32] >> i * kBits % 32 & ((1u << kBits) - 1);
      x[i] = static_cast<float>(static_cast<int>(code ^ 1u << (kBits - 1))) * step + minimum;
    }
  }
}

template <Format kFormat, class View>
ROTEXPORT_DEVICE LaneCodes load_codes(const View& bytes, int lane) {
  constexpr int kBytes = bits_of(kFormat);
  LaneCodes held = {};
  if constexpr (kBytes == 8) {
    const auto words = bytes.template load<Vector<uint32_t, 2>>(lane * kBytes);
    held.codes[0] = words.values[0];
    held.codes[1] = words.values[1];
  } else if constexpr (kBytes == 4) {
    held.codes[0] = bytes.template load<uint32_t>(lane * kBytes);
  } else {
    held.codes[0] = bytes.template load<uint16_t>(lane * kBytes);
  }
  return held;
}

// Widens the ring, and the call's tokens as they will be stored, into workspace.
template <class Element, Format kFormat>
ROTEXPORT_KERNEL void __launch_bounds__(kCacheThreads)
    stage(Geometry g, CacheOperands<Element> operands, int64_t errands) {
  const int64_t number = warp_number();
  if (number >= errands) return;
  const int lane = static_cast<int>(device::thread_index() % 32);
  const Errand errand = errand_of(g, number, g.window + g.tokens);
  const Row row = load_row(operands.past_length, operands.new_length, errand.batch, g.tokens);
  const int width = errand.value ? g.value_size : g.head_size;
  const int staged_width = errand.value ? g.value_size : g.key_row;
  const int group = errand.value ? g.value_group : g.key_group;
  Element* staged = operands.staged[errand.value ? 1 : 0];
  const int channel = lane * kLaneChannels;
  float x[kLaneChannels];
  int64_t to;
  if (errand.item < g.window) {
    if (errand.item >= row.past - g.sinks) return;  // never written
    const int groups = errand.value ? g.value_groups : g.key_groups;
    to = errand.cache_head * g.window + errand.item;
    const void* codes = errand.value ? operands.cache.window_value : operands.cache.window_key;
    const void* scales = errand.value ? operands.cache.window_value_scale : operands.cache.window_key_scale;
    if (channel < width) {
      LaneCodes held = load_codes<kFormat>(
          device::Global<const char>(static_cast<const char*>(codes)).from(to * width * bits_of(kFormat) / 8),
          lane);
      held.scale = load_scale<kFormat>(device::Global<const char>(static_cast<const char*>(scales))
                                           .from(to * groups * scale_bytes(kFormat)),
                                       channel / group);
      widen_channels<Element, kFormat>(x, held);
    }
  } else {
    const int token = errand.item - g.window;
    if (token >= row.fresh) return;
    const int64_t from = errand.cache_head * g.tokens + token;
    to = static_cast<int64_t>(g.batch) * g.kv_heads * g.window + from;
    load_centered(x, errand.value ? operands.value : operands.key, errand.value ? nullptr : operands.key_mean,
                  from, lane, width);
    const LaneCodes made = quantize<Element, kFormat>(x, lane, group);
    widen_channels<Element, kFormat>(x, made);
  }
  const device::Global<Element> written = device::Global<Element>(staged).from(to * staged_width);
  if (channel < width) {
    written.store(channel, pack_channels<Element>(x));
  } else if (channel < staged_width) {
    const int64_t angles = int64_t{errand.batch} * (g.window + g.tokens) + errand.item;
    written.store(channel, load_loose(operands.mean_angles + angles * g.angles, channel - width, g.angles));
  }
}

// Stores the call's tokens: those of the sinks, and the last ones of each ring. Every slot is written at most
// once, by the warp of its token.
template <class Element, Format kFormat>
class Update {
 public:
  ROTEXPORT_DEVICE Update(const Geometry& g, const CacheOperands<Element>& operands)
      : g_(g), operands_(operands) {}

  ROTEXPORT_DEVICE void run(int64_t number) const {
    const int in_window = ring_items(g_.tokens, g_.window);
    const int in_recent = ring_items(g_.tokens, g_.recent);
    Errand errand = errand_of(g_, number, g_.sinks + in_window + in_recent);
    const Row row = load_row(operands_.past_length, operands_.new_length, errand.batch, g_.tokens);
    const Cache& c = operands_.cache;
    if (errand.item < g_.sinks) {
      const int token = errand.item - row.past;
      if (token < 0 || token >= row.fresh) return;
      copy(errand, token, errand.value ? c.sink_value : c.sink_key, g_.sink_slots, errand.item);
      return;
    }
    errand.item -= g_.sinks;
    const bool recent = errand.item >= in_window;
    if (recent) errand.item -= in_window;
    const int slots = recent ? g_.recent : g_.window;
    const int token = row.fresh - (recent ? in_recent : in_window) + errand.item;
    const int position = row.past + token - g_.sinks;
    if (token < 0 || position < 0) return;
    if (recent) {
      copy(errand, token, errand.value ? c.recent_value : c.recent_key, slots, position % slots);
    } else if constexpr (kFormat == Format::kFloat) {
      copy(errand, token, errand.value ? c.window_value : c.window_key, slots, position % slots);
    } else {
      encode(errand, token, position % slots);
    }
  }

 private:
  static ROTEXPORT_DEVICE int lane() { return static_cast<int>(device::thread_index() % 32); }
  ROTEXPORT_DEVICE int width_of(const Errand& errand) const {
    return errand.value ? g_.value_size : g_.head_size;
  }
  ROTEXPORT_DEVICE device::Global<const Element> token_of(const Errand& errand, int token) const {
    const Element* tensor = errand.value ? operands_.value : operands_.key;
    return device::Global<const Element>(tensor + (errand.cache_head * g_.tokens + token) * width_of(errand));
  }

  ROTEXPORT_DEVICE void copy(const Errand& errand, int token, void* ring, int slots, int slot) const {
    using Chunk = Vector<uint32_t, 4>;
    const int width = width_of(errand);
    if (lane() * kLaneChannels >= width) return;
    const auto chunk = token_of(errand, token).template load<Chunk>(lane() * kLaneChannels);
    device::Global<Element>(static_cast<Element*>(ring))
        .from((errand.cache_head * slots + slot) * width)
        .store(lane() * kLaneChannels, chunk);
  }

  ROTEXPORT_DEVICE void encode(const Errand& errand, int token, int slot) const {
    const Cache& c = operands_.cache;
    const int width = width_of(errand);
    const int group = errand.value ? g_.value_group : g_.key_group;
    const int groups = errand.value ? g_.value_groups : g_.key_groups;
    float x[kLaneChannels];
    load_centered(x, errand.value ? operands_.value : operands_.key,
                  errand.value ? nullptr : operands_.key_mean, errand.cache_head * g_.tokens + token, lane(),
                  width);
    const LaneCodes made = quantize<Element, kFormat>(x, lane(), group);
    const int channel = lane() * kLaneChannels;
    if (channel >= width) return;
    const int64_t index = errand.cache_head * g_.window + slot;
    void* codes = errand.value ? c.window_value : c.window_key;
    void* scales = errand.value ? c.window_value_scale : c.window_key_scale;
    store_codes<kFormat>(
        device::Global<char>(static_cast<char*>(codes)).from(index * width * bits_of(kFormat) / 8), 0, made,
        lane());
    if (channel % group != 0) return;
    store_scale<kFormat>(
        device::Global<char>(static_cast<char*>(scales)).from(index * groups * scale_bytes(kFormat)),
        channel / group, made.scale);
  }

  const Geometry& g_;
  const CacheOperands<Element>& operands_;
};

// The first `combined` blocks combine a row each, the others store tokens, one per warp.
template <class Element, Format kFormat>
ROTEXPORT_KERNEL void __launch_bounds__(kCacheThreads)
    finish(Geometry g, CacheOperands<Element> operands, unsigned combined, int64_t errands) {
  if (device::block_index() < combined) {
    Combine<Element>(g, operands, operands.parts, nullptr).run();
    return;
  }
  const int64_t number = warp_number() - static_cast<int64_t>(combined) * kCacheWarps;
  if (number < errands) Update<Element, kFormat>(g, operands).run(number);
}

}  // namespace sink_window_attention
