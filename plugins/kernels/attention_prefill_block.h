// What a thread block of every prefill kernel works on.
//
// A block takes Traits::kRows packed query rows of one key head: token by token, within a token the query
// heads that share the key head, so that a tile of keys and values is read once for all of them. It walks
// over the tiles of Traits::kKeys keys of the ranges that any of its rows sees, first sinks, then what was
// staged as dequantized codes, then floating point.
#pragma once

#include "kernels/attention_softmax.h"

namespace sink_window_attention {

// Keys or values of one range and one (row of the batch, key head).
template <class Element>
struct Held {
  const Element* slots;
  const Element* fresh;
};

template <class Element>
struct PrefillOperands {
  const Element* query;
  const Element* query_sink;
  Held<Element> keys[kParts];
  Held<Element> values[kParts];
  const int32_t* past_length;
  const int32_t* new_length;
  const float* decay;
  Element* output;
  bool coded;  // codes were widened to keys[kFar] and values[kFar]
};

// A tile of a range: its first key. `part` is kParts behind the last.
struct Tile {
  int part;
  int first;
};

// Where a tile's keys are: all in one tensor if `all_fresh`.
struct Storage {
  Places places;
  int slots;
  bool all_fresh;
};

template <class Traits>
class PrefillBlock {
 protected:
  using Element = typename Traits::Element;
  using Chunk = Vector<uint32_t, 4>;

  ROTEXPORT_DEVICE PrefillBlock(const Geometry& geometry, const PrefillOperands<Element>& operands)
      : g_(geometry), operands_(operands) {}

  // Whether the block has a real token. If so, its queries are known from here on.
  ROTEXPORT_DEVICE bool begin() {
    const int first_token = first_row() / g_.repeat;
    const Row row = lengths();
    past_ = row.past;
    const int last_token = (first_row() + Traits::kRows - 1) / g_.repeat;
    first_query_ = row.past + first_token;
    last_query_ = row.past + (last_token < row.fresh ? last_token : row.fresh - 1);
    return first_token < row.fresh;
  }

  ROTEXPORT_DEVICE Range range(int part) const {
    return range_of(static_cast<Part>(part), g_, operands_.coded, first_query_, last_query_);
  }
  ROTEXPORT_DEVICE Tile first_tile(int part) const {
    Tile tile{part, 0};
    for (; tile.part < kParts; ++tile.part) {
      const Range keys = range(tile.part);
      tile.first = keys.first;
      if (keys.count() > 0) break;
    }
    return tile;
  }
  ROTEXPORT_DEVICE Tile after(Tile tile) const {
    tile.first += Traits::kKeys;
    return tile.first <= range(tile.part).last ? tile : first_tile(tile.part + 1);
  }
  static ROTEXPORT_DEVICE int last_key(const Tile& tile) { return tile.first + Traits::kKeys - 1; }

  ROTEXPORT_DEVICE Storage storage(const Tile& tile) const {
    const int slots = tile.part == kSinks                     ? g_.sink_slots
                      : tile.part == kFar || !operands_.coded ? g_.window
                                                              : g_.recent;
    const bool all_fresh = tile.first >= past_;
    return {
        tile.part == kSinks || all_fresh ? sink_places(past_, slots) : ring_places(past_, g_.sinks, slots),
        slots, all_fresh};
  }
  // Whether the tile's keys up to j = last lie one behind the other.
  ROTEXPORT_DEVICE bool in_a_row(const Tile& tile, const Storage& storage, int last) const {
    const Places& places = storage.places;
    return storage.all_fresh ||
           (last < past_ && places.slot(last) - places.slot(tile.first) == last - tile.first);
  }
  static ROTEXPORT_DEVICE const Held<Element>& held(const Held<Element> (&parts)[kParts], int part) {
    return parts[part == kSinks ? kSinks : part == kFar ? kFar : kNear];
  }
  // Of key j's row of `width` channels.
  ROTEXPORT_DEVICE const Element* address(const Held<Element>& held, const Storage& storage, int j,
                                          int width) const {
    const int64_t head = key_head();
    const Places& places = storage.places;
    return places.is_fresh(j) ? held.fresh + (head * g_.tokens + places.token(j)) * width
                              : held.slots + (head * storage.slots + places.slot(j)) * width;
  }

  // Index of a packed row among the rows of queries and outputs.
  ROTEXPORT_DEVICE int64_t query_row(int packed) const {
    const int64_t head = int64_t{key_head()} * g_.repeat + packed % g_.repeat;
    return head * g_.tokens + packed / g_.repeat;
  }
  // A packed row of the block that has a query: rows behind the last one repeat it.
  ROTEXPORT_DEVICE int real_row(int row) const {
    const int last_row = (last_query_ - past_ + 1) * g_.repeat - 1;
    return first_row() + row < last_row ? first_row() + row : last_row;
  }

  // Keeps the facts of rows first ... first + count - 1 for the warp: keep(row, facts). Returns whether any
  // of their logits decay.
  template <class Keep>
  ROTEXPORT_DEVICE bool prepare_rows(int first, int count, const Keep& keep) const {
    bool sloped = false;
    for (int i = lane(); i < count; i += 32) {
      const RowFacts facts = facts_of(g_, operands_.decay, past_, key_head(), first_row() + first + i);
      keep(first + i, facts);
      sloped |= facts.slope != 0;
    }
    sloped = device::any(sloped);
    device::warp_barrier();
    return sloped;
  }

  ROTEXPORT_DEVICE TileMask mask_of(const Tile& tile, bool sloped) const {
    const Range range = this->range(tile.part);
    return {range, tile.first, range.shows_all(first_query_, last_query_, tile.first, last_key(tile)),
            sloped && tile.part != kSinks};
  }

  // Writes the warp's rows first ... first + count - 1: value(row, column) for real tokens, zeros for
  // padding.
  template <class Value>
  ROTEXPORT_DEVICE void store(int first, int count, const Value& value) const {
    const int rows = g_.tokens * g_.repeat;
    const int fresh = lengths().fresh;
    const device::Global<Element> output(operands_.output);
    for (int i = lane(); i < count * (Traits::kSize / 8); i += 32) {
      const int row = first + i / (Traits::kSize / 8);
      const int column = i % (Traits::kSize / 8) * 8;
      const int packed = first_row() + row;
      if (packed >= rows || column >= g_.value_size) continue;
      const bool real = packed / g_.repeat < fresh;
      output.from(query_row(packed) * g_.value_size).store(column, real ? value(row, column) : Chunk{});
    }
  }
  static ROTEXPORT_DEVICE Chunk zeros(int, int) { return Chunk{}; }

  // What the block works on, found again rather than kept: sums need every register. Key heads are counted
  // through the batch.
  static ROTEXPORT_DEVICE int block() { return static_cast<int>(device::opaque(device::block_index())); }
  ROTEXPORT_DEVICE int first_row() const { return block() % g_.row_tiles * Traits::kRows; }
  ROTEXPORT_DEVICE Row lengths() const {
    return load_row(operands_.past_length, operands_.new_length, key_head() / g_.kv_heads, g_.tokens);
  }
  ROTEXPORT_DEVICE int key_head() const { return block() / g_.row_tiles; }

  static ROTEXPORT_DEVICE int thread() { return static_cast<int>(device::thread_index()); }
  static ROTEXPORT_DEVICE int lane() { return thread() % 32; }

  const Geometry& g_;
  const PrefillOperands<Element>& operands_;
  int past_;
  int first_query_;
  int last_query_;
};

}  // namespace sink_window_attention
