// Tiles of keys and values on their way to a block of Hopper's warpgroups.
//
// One warp copies them as far ahead as buffers allow. A tile whose keys lie one behind the other is copied as
// a box of kKeys rows, if each of them holds a token or lies outside what the map shows, where boxes are
// filled with zeros. Others (at a wrap of the ring, between ring and new tokens, before slots that nobody
// wrote) are copied in pieces of 16 bytes into the same layout: where the tokens end is known to the device
// alone, so no map of a tensor could end there.
#pragma once

#include "kernels/attention_prefill_block.h"
#include "kernels/attention_sizes.h"
#include "kernels/warpgroup_device.h"

namespace sink_window_attention {

// Keys or values: buffers and barriers of each.
enum Kind : int { kKeyTiles, kValueTiles, kKinds };

template <class Element_, int kSize_>
struct WarpgroupTraits {
  using Element = Element_;
  static constexpr int kSize = kSize_;
  static constexpr int kGroup = 128;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = kGroup * (1 + kConsumers);
  static constexpr int kGroupRows = 64;
  static constexpr int kWarpRows = 16;
  static constexpr int kRows = kGroupRows * kConsumers;
  static constexpr bool kSplits = false;
  static constexpr int kKeys = kWarpgroupKeys;
  static constexpr int kStages = kSize == 64 ? 4 : 2;
  static constexpr int kPanel = device::kTileColumns;  // a tile is stored as panels of so many columns
  static constexpr int kPanels = kSize / kPanel;
  static constexpr int kRowBytes = kPanel * 2;
  static constexpr unsigned kTileBytes = kKeys * kSize * 2;
  static constexpr unsigned kQueryBytes = kRows * kSize * 2;
  // In shared memory: queries, those for sinks, stages of keys, stages of values, facts of rows, barriers.
  static constexpr unsigned kTiles = 2 * kQueryBytes;
  static constexpr unsigned kFacts = kTiles + kKinds * kStages * kTileBytes;
  static constexpr unsigned kBarriers = kFacts + kRows * sizeof(RowFacts);
  static constexpr unsigned kSharedBytes = kBarriers + 2 * kKinds * kStages * 8;
  // Of a thread; together they are what the block starts with.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  static_assert(kSize == 64 || kSize == 128, "whole panels, and sums that registers hold");
  static_assert(kRows == prefill_rows(kSize), "blocks take as many rows as the planner counts");
  static_assert(kSharedBytes <= 227 * 1024, "what a block of Hopper may have");
};

// How many of a call's tokens boxes of a part show: for sinks no others, whose NaN every query would meet.
constexpr int shown_tokens(const Geometry& g, int part) {
  return part == kSinks && g.sinks < g.tokens ? g.sinks : g.tokens;
}

// Boxes of each part's slots and of the call's tokens.
struct TileMaps {
  device::TileMap tensors[kKinds][kParts][2];
};

// A buffer, and the parity of the phase that its barriers are in.
struct Stage {
  int index = 0;
  unsigned parity = 0;
};

template <class Traits>
class WarpgroupTiles : protected PrefillBlock<Traits> {
 protected:
  using Block = PrefillBlock<Traits>;
  using Block::after;
  using Block::first_tile;
  using Block::g_;
  using Block::lane;
  using Block::past_;
  using Block::range;
  using Block::views_;
  using typename Block::Chunk;
  using typename Block::Element;
  using typename Block::Tile;

  ROTEXPORT_DEVICE WarpgroupTiles(const Geometry& geometry, const PrefillOperands<Element>& operands,
                                  const TileMaps& maps)
      : Block(geometry, operands), maps_(maps) {}

  // Tiles that have arrived, and buffers that are free again.
  static ROTEXPORT_DEVICE device::Mbarrier full(int kind, int stage) {
    return device::Mbarrier(Traits::kBarriers + 8 * (kind * Traits::kStages + stage));
  }
  static ROTEXPORT_DEVICE device::Mbarrier empty(int kind, int stage) {
    return device::Mbarrier(Traits::kBarriers + 8 * ((kKinds + kind) * Traits::kStages + stage));
  }
  static ROTEXPORT_DEVICE void initialize_barriers() {
    for (int i = 0; i < Traits::kStages; ++i) {
      for (int kind = 0; kind < kKinds; ++kind) {
        full(kind, i).init(1);
        empty(kind, i).init(Traits::kConsumers * Traits::kGroup / 32);
      }
    }
    device::fence_async_proxy();
  }
  static ROTEXPORT_DEVICE void advance(Stage& stage) {
    stage.index = stage.index + 1 < Traits::kStages ? stage.index + 1 : 0;
    if (stage.index == 0) stage.parity ^= 1;
  }
  static ROTEXPORT_DEVICE device::Shared<Element> tile_buffer(int kind, int stage) {
    return device::Shared<Element>(Traits::kTiles + (kind * Traits::kStages + stage) * Traits::kTileBytes);
  }
  // Index of 8 columns in panels of `rows` rows, in the swizzle of tile copies.
  static ROTEXPORT_DEVICE int piece_at(int row, int column, int rows) {
    const int piece = column % Traits::kPanel / 8 ^ row % 8;
    return (column / Traits::kPanel * rows + row) * Traits::kPanel + piece * 8;
  }

  // Columns that only exist in the padded size are zeros.
  static ROTEXPORT_DEVICE void copy_piece(const device::Shared<Element>& to, int index, const Element* row,
                                          int column, int width) {
    if (column < width) {
      device::copy_async(to, index, row + column);
    } else {
      to.store(index, Chunk{});
    }
  }

  ROTEXPORT_DEVICE void produce() const {
    const int fresh = Block::lengths().fresh;
    Stage stage;
    for (Tile tile = first_tile(); tile.exists(); tile = after(tile)) {
      const Storage storage = Block::storage(tile);
      const bool box = is_box(tile, storage, fresh);
      for (int kind = 0; kind < kKinds; ++kind) {
        empty(kind, stage.index).wait(stage.parity ^ 1);
        device::warp_barrier();  // all lanes have seen this phase before the next one can end
        if (!box) {
          copy_pieces(kind, stage.index, tile, storage);
        } else if (lane() == 0) {
          copy_box(kind, stage.index, tile, storage);
        }
      }
      advance(stage);
    }
  }

 private:
  // Whether kKeys rows from the tile's first one on hold tokens, or lie outside what boxes show.
  ROTEXPORT_DEVICE bool is_box(const Tile& tile, const Storage& storage, int fresh) const {
    const int last = Block::last_key(tile);
    const Places& places = storage.places;
    if (storage.all_fresh) return fresh >= shown_tokens(g_, tile.part) || places.token(last) < fresh;
    const int last_needed = last < range(tile.part).last ? last : range(tile.part).last;
    if (!Block::in_a_row(tile, storage, last_needed)) return false;
    const int written = past_ - (tile.part == kSinks ? 0 : g_.sinks);
    return written >= storage.slots || places.slot(tile.first) + Traits::kKeys <= written;
  }

  ROTEXPORT_DEVICE void copy_box(int kind, int stage, const Tile& tile, const Storage& storage) const {
    const Places& places = storage.places;
    const device::TileMap& map = maps_.tensors[kind][tile.part][storage.all_fresh ? 1 : 0];
    const int row = storage.all_fresh ? places.token(tile.first) : places.slot(tile.first);
    const device::Mbarrier arrived = full(kind, stage);
    arrived.arrive_expecting(Traits::kTileBytes);
    ROTEXPORT_UNROLL
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      device::copy_tile(tile_buffer(kind, stage), panel * Traits::kKeys * Traits::kPanel, map,
                        panel * Traits::kPanel, row, Block::key_head(), arrived);
    }
  }

  // Rows behind the range's last one repeat it: they are hidden, but must be finite where the others are.
  ROTEXPORT_DEVICE void copy_pieces(int kind, int stage, const Tile& tile, const Storage& storage) const {
    const int width = kind == kKeyTiles ? g_.head_size : g_.value_size;
    const Held<Element>& held = Block::held(kind == kKeyTiles ? views_.keys : views_.values, tile.part);
    const device::Shared<Element> to = tile_buffer(kind, stage);
    const int last = range(tile.part).last;
    constexpr int kPieces = Traits::kSize / 8;
    ROTEXPORT_UNROLL_BY(4)
    for (int i = lane(); i < Traits::kKeys * kPieces; i += 32) {
      const int row = i / kPieces;
      const int column = i % kPieces * 8;
      const int j = tile.first + row < last ? tile.first + row : last;
      copy_piece(to, piece_at(row, column, Traits::kKeys), Block::address(held, storage, j, width), column,
                 width);
    }
    device::copy_async_commit();
    device::copy_async_wait<0>();
    device::fence_async_proxy();
    device::warp_barrier();
    if (lane() == 0) full(kind, stage).arrive();
  }

  const TileMaps& maps_;
};

}  // namespace sink_window_attention
