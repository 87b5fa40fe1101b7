// The tiles of keys that a thread block of every prefill kernel walks over: Traits::kKeys keys each of the
// ranges that any of its queries sees, first sinks, then what was staged as dequantized codes, then floating
// point.
#pragma once

#include "kernels/attention_keys.h"
#include "kernels/attention_query_block.h"

namespace sink_window_attention {

// Keys or values of one range and one (row of the batch, key head).
template <class Element>
struct Held {
  const Element* slots;
  const Element* fresh;
};

template <class Element>
struct PrefillOperands : CallViews<Element> {
  Held<Element> keys[kParts];
  Held<Element> values[kParts];
  bool coded;  // codes were widened to keys[kFar] and values[kFar]
};

// Where a tile's keys are: all in one tensor if `all_fresh`.
struct Storage {
  Places places;
  int slots;
  bool all_fresh;
};

template <class Traits>
class PrefillBlock : protected QueryBlock<Traits, Geometry, PrefillOperands<typename Traits::Element>> {
 protected:
  using Block = QueryBlock<Traits, Geometry, PrefillOperands<typename Traits::Element>>;
  using Block::first_query_;
  using Block::g_;
  using Block::last_query_;
  using Block::past_;
  using Block::views_;
  using typename Block::Element;

  // A tile of a range: its first key. `part` is kParts behind the last.
  struct Tile {
    int part;
    int first;

    ROTEXPORT_DEVICE bool exists() const { return part < kParts; }
    ROTEXPORT_DEVICE bool meets_sinks() const { return part == kSinks; }
  };

  ROTEXPORT_DEVICE PrefillBlock(const Geometry& geometry, const PrefillOperands<Element>& operands)
      : Block(geometry, operands) {}

  ROTEXPORT_DEVICE Range range(int part) const {
    return range_of(static_cast<Part>(part), g_, views_.coded, first_query_, last_query_);
  }
  ROTEXPORT_DEVICE Tile first_tile(int part = kSinks) const {
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
    const int slots = tile.part == kSinks                  ? g_.sink_slots
                      : tile.part == kFar || !views_.coded ? g_.window
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
    const int64_t head = Block::key_head();
    const Places& places = storage.places;
    return places.is_fresh(j) ? held.fresh + (head * g_.tokens + places.token(j)) * width
                              : held.slots + (head * storage.slots + places.slot(j)) * width;
  }

  // A tile's products become weights: see Softmax. facts(i) are those of row i, of which some are `sloped`.
  template <class Softmax, class Product, class Facts, int kRows>
  ROTEXPORT_DEVICE bool weigh_range(Softmax& softmax, const Tile& tile, bool sloped, const Product& product,
                                    const Facts& facts, float (&shrinks)[kRows]) const {
    const Curve curve(g_);
    const Range range = this->range(tile.part);
    const bool slopes = sloped && tile.part != kSinks;
    const bool whole = range.shows_all(first_query_, last_query_, tile.first, last_key(tile));
    const auto bend = [&](int i) {
      const RowFacts row = facts(i);
      const int first_key = tile.first + Block::lane() % 4 * 2;
      const float slope = slopes ? row.slope : 0.0f;
      const float nearest = slope * static_cast<float>(first_key - row.position);
      Softmax::for_each(i, product, [&](float& x, int key) {
        x = curve(x) + nearest + slope * static_cast<float>(key);
        if (!range.shows(row.position, first_key + key)) x = kHidden;
      });
    };
    return softmax.weigh(curve, whole && !slopes && !(curve.cap > 0), product, bend, shrinks);
  }
};

}  // namespace sink_window_attention
