// The tiles of keys that a thread block attends to: one of Geometry::splits parts of those that any of its
// queries sees, sinks, then slots, of which tiles without a token are passed over, then new tokens.
#pragma once

#include "kernels/attention_query_block.h"
#include "kernels/eviction_tokens.h"

namespace eviction {

template <class Traits>
class AttendBlock : protected QueryBlock<Traits, Geometry, Views<typename Traits::Element>> {
 protected:
  using Block = QueryBlock<Traits, Geometry, Views<typename Traits::Element>>;
  using Block::first_query_;
  using Block::g_;
  using Block::last_query_;
  using Block::past_;
  using Block::views_;
  using typename Block::Chunk;
  using typename Block::Element;

  enum Part : int { kSinks, kSlots, kFresh, kNoPart };

  // A tile of keys: its first position, or slot, and which of its slots hold a token.
  struct Tile {
    int index;
    Part part;
    int first;
    uint32_t held[2];

    ROTEXPORT_DEVICE bool exists() const { return part != kNoPart; }
    ROTEXPORT_DEVICE bool meets_sinks() const { return part == kSinks; }
  };

  ROTEXPORT_DEVICE AttendBlock(const Geometry& geometry, const Rules& rules, const Views<Element>& views)
      : Block(geometry, views), rules_(rules) {}

  ROTEXPORT_DEVICE Tile first_tile() {
    const int each = tiles_of(count_tiles(), g_.splits);
    const int first = Block::split() * each;
    end_ = first + each < count_tiles() ? first + each : count_tiles();
    return seen_from(first);
  }
  ROTEXPORT_DEVICE Tile after(const Tile& tile) const { return seen_from(tile.index + 1); }

  // Whether all queries see all keys of a tile; of slots it is not known.
  ROTEXPORT_DEVICE bool shows_all(const Tile& tile) const {
    const int last = tile.first + kTile - 1;
    if (tile.part == kSinks) return last < g_.sinks && last <= first_query_;
    return tile.part == kFresh && last <= first_query_ && last_query_ - tile.first < rules_.context;
  }

  // Position of a tile's key i; kForever for what nobody sees.
  ROTEXPORT_DEVICE int position(const Tile& tile, int i) const {
    const int at = tile.first + i;
    if (tile.part == kFresh) return at;
    if (tile.part == kSinks) return at < g_.sinks ? at : int{kForever};
    const int j = at < g_.window ? tokens().held(at) : kNone;
    return j == kNone ? int{kForever} : j;
  }

  // Where slots and new tokens have their numbers: the first of a tile.
  ROTEXPORT_DEVICE int column(const Tile& tile) const {
    return tile.part == kSlots ? tile.first : g_.window + tile.first - past_;
  }

  // Starts to copy a tile's keys, or values, from where slots and new tokens are. Rows of no token become
  // zeros; new tokens behind the last query's repeat it. Both are hidden, but must be finite where the others
  // are.
  ROTEXPORT_DEVICE void load_rows(const device::Shared<Element>& to, const Tile& tile, const void* held,
                                  const Element* fresh, int width) const {
    const int slots = tile.part == kSinks ? g_.sink_slots : g_.window;
    const Element* held_rows = static_cast<const Element*>(held) + int64_t{Block::key_head()} * slots * width;
    const Element* fresh_rows = fresh + int64_t{Block::key_head()} * g_.tokens * width;
    ROTEXPORT_ROLL
    for (int i = Block::thread(); i < kTile * Traits::kSize / 8; i += Traits::kThreads) {
      const int row = i / (Traits::kSize / 8);
      const int column = i % (Traits::kSize / 8) * 8;
      if (column >= width) continue;
      int at = tile.first + row;
      const Element* rows = held_rows;
      if (tile.part == kSlots) {
        if (((row < 32 ? tile.held[0] : tile.held[1]) >> row % 32 & 1) == 0) rows = nullptr;
      } else {
        const int last = tile.part == kSinks && g_.sinks <= last_query_ ? g_.sinks - 1 : last_query_;
        at = at < last ? at : last;
        if (at >= past_) {
          rows = fresh_rows;
          at -= past_;
        }
      }
      const unsigned place = row * Traits::kStride + column;
      if (rows == nullptr) {
        to.store(place, Chunk{});
      } else {
        device::copy_async(to, place, rows + int64_t{at} * width + column);
      }
    }
  }

  const Rules& rules_;

 private:
  ROTEXPORT_DEVICE Tokens tokens() const {
    return Tokens(g_, views_, Block::key_head(), {past_, last_query_ - past_ + 1});
  }

  // Of the tiles that some query may see.
  ROTEXPORT_DEVICE int sink_tiles() const {
    return tiles_of(g_.sinks <= last_query_ ? g_.sinks : last_query_ + 1, kTile);
  }
  ROTEXPORT_DEVICE int slot_tiles() const { return past_ > g_.sinks ? tiles_of(g_.window, kTile) : 0; }
  ROTEXPORT_DEVICE int first_fresh() const {
    const int nearest = first_query_ - rules_.context + 1;
    const int first = nearest < past_ ? past_ : nearest;
    return first < g_.sinks ? g_.sinks : first;
  }
  ROTEXPORT_DEVICE int count_tiles() const {
    const int fresh = last_query_ - first_fresh() + 1;
    return sink_tiles() + slot_tiles() + (fresh > 0 ? tiles_of(fresh, kTile) : 0);
  }

  // The first tile from `index` on that holds a token which some query sees. All warps find the same.
  ROTEXPORT_DEVICE Tile seen_from(int index) const {
    for (; index < end_; ++index) {
      if (index < sink_tiles()) return {index, kSinks, index * kTile, {}};
      const int behind = index - sink_tiles();
      if (behind >= slot_tiles()) return {index, kFresh, first_fresh() + (behind - slot_tiles()) * kTile, {}};
      Tile tile = {index, kSlots, behind * kTile, {}};
      const Tokens tokens = this->tokens();
      bool seen = false;
      ROTEXPORT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int slot = tile.first + 32 * half + Block::lane();
        const int j = slot < g_.window ? tokens.held(slot) : kNone;
        tile.held[half] = device::ballot(j != kNone);
        seen |= j != kNone && first_query_ - j < rules_.context;
      }
      if (device::any(seen)) return tile;
    }
    return {index, kNoPart, 0, {}};
  }

  int end_;  // behind the last tile of the block's part
};

}  // namespace eviction
