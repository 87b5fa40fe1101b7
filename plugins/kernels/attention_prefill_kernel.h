// Sink/window attention for many queries on tensor cores of any architecture.
#pragma once

#include "kernels/attention_prefill_block.h"
#include "kernels/attention_sizes.h"
#include "kernels/attention_tiles.h"

namespace sink_window_attention {

template <class Element, int kSize>
struct PrefillTraits : TileTraits<Element, kSize, prefill_row_tiles(kSize)> {
  using Tiles = TileTraits<Element, kSize, prefill_row_tiles(kSize)>;
  static constexpr bool kSplits = false;
  static constexpr bool kWholeRows = Tiles::kThreads % (kSize / 8) == 0;  // copied at once by all threads

  static_assert(Tiles::kRows == prefill_rows(kSize), "blocks take as many rows as the planner counts");
};

template <class Traits>
class Prefill : TileAttention<Prefill<Traits>, PrefillBlock<Traits>, Traits> {
  using Attention = TileAttention<Prefill<Traits>, PrefillBlock<Traits>, Traits>;
  using Block = PrefillBlock<Traits>;
  using typename Block::Element;
  using typename Block::Tile;
  friend Attention;

 public:
  ROTEXPORT_DEVICE Prefill(const Geometry& geometry, const PrefillOperands<Element>& operands)
      : Attention(geometry, operands) {}

  ROTEXPORT_DEVICE void run() {
    if (Block::begin()) {
      Attention::attend();
      Attention::store_output();
    } else {
      Block::store(Attention::warp_row(), Traits::kWarpRows, Block::zeros);
    }
  }

 private:
  using Attention::g_;
  using Attention::thread;
  using Attention::views_;

  static constexpr bool has_rows() { return true; }  // those without only fill up a prompt's last block

  ROTEXPORT_DEVICE void load_keys(const Tile& tile) const {
    load_rows(this->key_, tile, views_.keys, g_.head_size);
  }
  ROTEXPORT_DEVICE void load_values(const Tile& tile) const {
    load_rows(this->value_, tile, views_.values, g_.value_size);
  }
  ROTEXPORT_DEVICE void leave(const Tile&) const {}

  // Rows behind the range's last one repeat it: they are hidden, but must be finite where the others are.
  ROTEXPORT_DEVICE void load_rows(const device::Shared<Element>& to, const Tile& tile,
                                  const Held<Element> (&parts)[kParts], int width) const {
    const Storage storage = Block::storage(tile);
    const Held<Element>& held = Block::held(parts, tile.part);
    const Range range = this->range(tile.part);
    const auto address = [&](int j) { return Block::address(held, storage, j, width); };
    const int last = Block::last_key(tile);
    if (Traits::kWholeRows && Block::in_a_row(tile, storage, last) && last <= range.last &&
        width == Traits::kSize) {
      copy_neighbours(to, address(tile.first));
      return;
    }
    ROTEXPORT_ROLL
    for (int i = 0; i < Traits::kKeys * Traits::kSize / 8; i += Traits::kThreads) {
      const int at = i + thread();
      const int row = at / (Traits::kSize / 8);
      const int column = at % (Traits::kSize / 8) * 8;
      const int j = tile.first + row < range.last ? tile.first + row : range.last;
      if (column < width) device::copy_async(to, row * Traits::kStride + column, address(j) + column);
    }
  }

  // The usual case: the tile's rows lie one behind the other, and all offsets are constants.
  ROTEXPORT_DEVICE void copy_neighbours(const device::Shared<Element>& to, const Element* rows) const {
    constexpr int kChunks = Traits::kSize / 8;
    const int row = thread() / kChunks;
    const int column = thread() % kChunks * 8;
    const Element* from = rows + row * Traits::kSize + column;
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kKeys; i += Traits::kThreads / kChunks) {
      device::copy_async(to, (row + i) * Traits::kStride + column, from + i * Traits::kSize);
    }
  }

  template <class Product, int kRows>
  ROTEXPORT_DEVICE bool weigh(const Tile& tile, const Product& product, float (&shrinks)[kRows]) {
    const auto facts = [this](int i) { return Attention::lane_facts(i); };
    return Block::weigh_range(this->softmax_, tile, this->sloped_, product, facts, shrinks);
  }
};

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads, 1)
    prefill(Geometry geometry, PrefillOperands<typename Traits::Element> operands) {
  Prefill<Traits>(geometry, operands).run();
}

}  // namespace sink_window_attention
