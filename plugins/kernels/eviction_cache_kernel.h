// What happens around the products and the choice: parts of outputs are combined and, last of all, what stays
// is moved to its slots.
#pragma once

#include "kernels/attention_combine.h"
#include "kernels/eviction_tokens.h"

namespace eviction {

// Combines the parts of one packed query row (see Attend) into its output.
template <class Element>
ROTEXPORT_KERNEL void __launch_bounds__(kCombineThreads) combine(Geometry g, Views<Element> views) {
  const Parts<const float> parts = {views.scratch.parts.sums, views.scratch.parts.weights};
  Combine<Element>(g, views, parts, views.scratch.stats).run();
}

// Brings what stays to its slots (see Choose), in place. A thread block takes sixteen channels of all keys,
// or values, of one key head. Tokens keep their order, so those that move up can do so from the last on, each
// into a slot that was read before, and those that move down from the first on.
constexpr int kStoreThreads = 256;

template <class Element>
class Store {
  using Chunk = Vector<uint32_t, 4>;
  static constexpr int kInFlight = 4;
  static constexpr int kChannels = 16;
  static constexpr int kTurn = kStoreThreads / 2;  // slots that the block's threads read at once
  static constexpr int kSlots = kTurn * kInFlight;

 public:
  ROTEXPORT_DEVICE Store(const Geometry& g, const Views<Element>& views) : g_(g), views_(views) {
    const int key_slices = g.head_size / kChannels;
    const int slices = key_slices + g.value_size / kChannels;
    const int slice = static_cast<int>(device::block_index()) % slices;
    head_ = static_cast<int>(device::block_index()) / slices;
    const bool value = slice >= key_slices;
    writes_scores_ = slice == 0;
    width_ = value ? g.value_size : g.head_size;
    const int channel = (value ? slice - key_slices : slice) * kChannels + thread() % 2 * 8;
    void* slots = value ? views.cache.window_value : views.cache.window_key;
    slots_ = device::Global<Element>(static_cast<Element*>(slots))
                 .from(int64_t{head_} * g.window * width_ + channel);
    fresh_ = device::Global<const Element>(value ? views.value : views.key)
                 .from(int64_t{head_} * g.tokens * width_ + channel);
    source_ = device::Global<const int>(views.scratch.source).from(int64_t{head_} * g.window);
    position_ = device::Global<const int>(views.scratch.position).from(int64_t{head_} * g.window);
  }

  // Blocks for one key head.
  static constexpr int blocks(const Geometry& g) { return (g.head_size + g.value_size) / kChannels; }

  ROTEXPORT_DEVICE void run() const {
    const device::Global<const int> moves(views_.scratch.moves);
    const int up = moves.load<int>(2 * head_);
    const int down = g_.window - moves.load<int>(2 * head_ + 1);
    for (int first = tiles_of(up, kSlots) * kSlots - kSlots; first >= 0; first -= kSlots) move(first, true);
    for (int first = down - down % kSlots; first < g_.window; first += kSlots) move(first, false);
    if (writes_scores_) write_scores();
  }

 private:
  ROTEXPORT_DEVICE void move(int first, bool up) const {
    Chunk chunks[kInFlight];
    bool moves[kInFlight];
    ROTEXPORT_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int slot = first + i * kTurn + thread() / 2;
      chunks[i] = Chunk{};
      moves[i] = false;
      if (slot >= g_.window) continue;
      const int number = source_.template load<int>(slot);
      const int from = number < g_.tokens ? kNone : number - g_.tokens;
      const bool empty = position_.template load<int>(slot) == 0;
      moves[i] = up ? from < slot || (from == slot && empty) : from > slot;
      if (!moves[i] || empty) continue;
      chunks[i] = from == kNone
                      ? fresh_.from(int64_t{g_.tokens - 1 - number} * width_).template load<Chunk>(0)
                      : slots_.from(int64_t{from} * width_).template load<Chunk>(0);
    }
    device::barrier();
    ROTEXPORT_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t slot = first + i * kTurn + thread() / 2;
      if (moves[i]) slots_.from(slot * width_).store(0, chunks[i]);
    }
    device::barrier();
  }

  ROTEXPORT_DEVICE void write_scores() const {
    const int64_t first = int64_t{head_} * g_.window;
    const auto kept = device::Global<const float>(views_.scratch.kept).from(first);
    const auto positions = device::Global<int>(static_cast<int*>(views_.cache.window_position)).from(first);
    const auto scores = device::Global<float>(static_cast<float*>(views_.cache.window_score)).from(first);
    for (int slot = thread(); slot < g_.window; slot += kStoreThreads) {
      positions.store(slot, position_.template load<int>(slot));
      scores.store(slot, kept.template load<float>(slot));
    }
  }

  static ROTEXPORT_DEVICE int thread() { return static_cast<int>(device::thread_index()); }

  const Geometry& g_;
  const Views<Element>& views_;
  int head_;
  int width_;
  bool writes_scores_;
  device::Global<Element> slots_;
  device::Global<const Element> fresh_;
  device::Global<const int> source_;
  device::Global<const int> position_;
};

// A warp stores a token of the call that is a sink: keys, or values, of one key head.
template <class Element>
ROTEXPORT_DEVICE void store_sink(const Geometry& g, const Views<Element>& views, int64_t number) {
  using Chunk = Vector<uint32_t, 4>;
  const int sink = static_cast<int>(number % g.sinks);
  const bool value = number / g.sinks % 2 != 0;
  const int64_t head = number / g.sinks / 2;
  if (head >= int64_t{g.batch} * g.kv_heads) return;
  const Row row =
      load_row(views.past_length, views.new_length, static_cast<int>(head / g.kv_heads), g.tokens);
  const int token = sink - row.past;
  const int width = value ? g.value_size : g.head_size;
  const int channel = static_cast<int>(device::thread_index()) % 32 * 8;
  if (token < 0 || token >= row.fresh || channel >= width) return;
  const device::Global<const Element> fresh(value ? views.value : views.key);
  void* sinks = value ? views.cache.sink_value : views.cache.sink_key;
  device::Global<Element>(static_cast<Element*>(sinks))
      .from((head * g.sink_slots + sink) * width)
      .store(channel, fresh.from((head * g.tokens + token) * width).template load<Chunk>(channel));
}

// The first `moving` blocks move tokens, the others store sinks, one per warp.
template <class Element>
ROTEXPORT_KERNEL void __launch_bounds__(kStoreThreads)
    store(Geometry geometry, Views<Element> views, unsigned moving) {
  if (device::block_index() < moving) {
    Store<Element>(geometry, views).run();
    return;
  }
  constexpr int kWarps = kStoreThreads / 32;
  const int64_t block = static_cast<int64_t>(device::block_index() - moving);
  store_sink(geometry, views, block * kWarps + device::thread_index() / 32);
}

}  // namespace eviction
