// Sink/window attention for many queries on Hopper's asynchronous copies and warpgroup products.
//
// One warp copies tiles of keys and values; two warpgroups of 64 query rows each multiply them. While a tile
// is weighed, values of the one before it are multiplied. Tiles, masks and softmax are those of the portable
// kernel.
#pragma once

#include "kernels/attention_softmax.h"
#include "kernels/attention_warpgroup_tiles.h"

namespace sink_window_attention {

template <class Traits>
class WarpgroupPrefill : WarpgroupTiles<Traits> {
  using Block = WarpgroupTiles<Traits>;
  using typename Block::Chunk;
  using typename Block::Element;
  using typename Block::Tile;

 public:
  ROTEXPORT_DEVICE WarpgroupPrefill(const Geometry& geometry, const PrefillOperands<Element>& operands,
                                    const TileMaps& maps)
      : Block(geometry, operands, maps), query_(0), facts_(Traits::kFacts) {}

  ROTEXPORT_DEVICE void run() {
    const bool produces = thread() < Traits::kGroup;
    if (!Block::begin()) {
      if (!produces) Block::store(warp_row(), Traits::kWarpRows, Block::zeros);
      return;
    }
    if (thread() == 0) Block::initialize_barriers();
    device::barrier();
    if (produces) {
      device::give_registers<Traits::kProducerRegisters>();
      if (thread() < 32) Block::produce();
    } else {
      device::take_registers<Traits::kConsumerRegisters>();
      consume();
    }
  }

 private:
  using Block::advance;
  using Block::after;
  using Block::copy_piece;
  using Block::empty;
  using Block::first_tile;
  using Block::full;
  using Block::g_;
  using Block::lane;
  using Block::piece_at;
  using Block::thread;
  using Block::tile_buffer;
  using Block::views_;

  ROTEXPORT_DEVICE void consume() {
    prepare();
    Stage stage;
    Tile tile = first_tile();
    full(kKeyTiles, stage.index).wait(stage.parity);
    device::warpgroup_arrive();
    multiply_keys(tile, stage.index);
    device::warpgroup_wait<0>(products_);
    release(kKeyTiles, stage.index);
    float shrinks[2];
    weigh(tile, shrinks);
    pack_weights();
    for (tile = after(tile); tile.exists(); tile = after(tile)) {
      const Stage before = stage;
      advance(stage);
      full(kKeyTiles, stage.index).wait(stage.parity);
      device::warpgroup_arrive();
      multiply_keys(tile, stage.index);
      full(kValueTiles, before.index).wait(before.parity);
      device::warpgroup_arrive();
      multiply_values(before.index);
      device::warpgroup_wait<1>(products_);
      release(kKeyTiles, stage.index);
      const bool shrinking = weigh(tile, shrinks);
      device::warpgroup_wait<0>(output_);
      release(kValueTiles, before.index);
      if (shrinking) shrink(shrinks);
      pack_weights();
    }
    full(kValueTiles, stage.index).wait(stage.parity);
    device::warpgroup_arrive();
    multiply_values(stage.index);
    device::warpgroup_wait<0>(output_);
    finish();
  }

  ROTEXPORT_DEVICE void prepare() {
    if (g_.sinks > 0) load_queries(views_.query_sink, Traits::kQueryBytes / 2);
    load_queries(views_.query, 0);
    sloped_ = Block::prepare_rows(warp_row(), Traits::kWarpRows,
                                  [this](int row, const RowFacts& facts) { facts_.store(row, facts); });
    softmax_.start();
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kSize / 2; ++i) output_.at(i) = 0;
    device::copy_async_wait<0>();
    device::fence_async_proxy();
    meet_group();
  }

  // The warpgroup's rows.
  ROTEXPORT_DEVICE void load_queries(const Element* from, int first) const {
    constexpr int kPieces = Traits::kSize / 8;
    ROTEXPORT_UNROLL_BY(4)
    for (int i = thread() % Traits::kGroup; i < Traits::kGroupRows * kPieces; i += Traits::kGroup) {
      const int row = group_row() + i / kPieces;
      const int column = i % kPieces * 8;
      copy_piece(query_, first + piece_at(row, column, Traits::kRows),
                 from + Block::real_query(row) * g_.head_size, column, g_.head_size);
    }
    device::copy_async_commit();
  }

  // A warp's products have read a buffer.
  ROTEXPORT_DEVICE void release(int kind, int stage) const {
    if (lane() == 0) empty(kind, stage).arrive();
  }

  // products_ = queries . keys, on their way
  ROTEXPORT_DEVICE void multiply_keys(const Tile& tile, int stage) {
    const int queries = (tile.part == kSinks ? Traits::kQueryBytes / 2 : 0) + group_row() * Traits::kPanel;
    const uint64_t a = device::describe_matrix(query_, queries, 16);
    const uint64_t b = device::describe_matrix(tile_buffer(kKeyTiles, stage), 0, 16);
    ROTEXPORT_UNROLL
    for (int k = 0; k < Traits::kSize / 16; ++k) {
      const int within = k % 4 * 32;
      const uint64_t a_step = device::advance(a, k / 4 * Traits::kRows * Traits::kRowBytes + within);
      const uint64_t b_step = device::advance(b, k / 4 * Traits::kKeys * Traits::kRowBytes + within);
      if (k == 0) {
        device::multiply_shared<Element, false>(products_, a_step, b_step);
      } else {
        device::multiply_shared<Element, true>(products_, a_step, b_step);
      }
    }
    device::warpgroup_commit();
  }

  // output_ += weights . values, on their way
  ROTEXPORT_DEVICE void multiply_values(int stage) {
    const uint64_t b =
        device::describe_matrix(tile_buffer(kValueTiles, stage), 0, Traits::kKeys * Traits::kRowBytes);
    ROTEXPORT_UNROLL
    for (int k = 0; k < Traits::kKeys / 16; ++k) {
      device::multiply_registers<Element>(output_, weights_, 4 * k,
                                          device::advance(b, 16 * k * Traits::kRowBytes));
    }
    device::warpgroup_commit();
  }

  // products_ become weights.
  ROTEXPORT_DEVICE bool weigh(const Tile& tile, float (&shrinks)[2]) {
    return Block::weigh_range(
        softmax_, tile, sloped_,
        [this](int i, int c) -> float& { return products_.at(c / 2 * 4 + 2 * i + c % 2); },
        [this](int i) { return facts_.template load<RowFacts>(warp_row() + 8 * i + lane() / 4); }, shrinks);
  }

  // Brings the output to the maxima that weights are taken against.
  ROTEXPORT_DEVICE void shrink(const float (&shrinks)[2]) {
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kSize / 2; ++i) output_.at(i) *= shrinks[i / 2 % 2];
  }

  ROTEXPORT_DEVICE void pack_weights() {
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kKeys / 4; ++i) {
      weights_.at(i) = device::pack<Element>(products_.at(2 * i), products_.at(2 * i + 1));
    }
  }

  // Divides by the sums and stores, through the warp's own rows of the query buffer.
  ROTEXPORT_DEVICE void finish() {
    meet_group();  // nobody's products read the queries any more
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float inverse = softmax_.inverse_sum(half);
      const int row = warp_row() + 8 * half + lane() / 4;
      ROTEXPORT_UNROLL
      for (int n = 0; n < Traits::kSize / 8; ++n) {
        const int i = 4 * n + 2 * half;
        query_.store(piece_at(row, 8 * n, Traits::kRows) + lane() % 4 * 2,
                     device::pack<Element>(output_.at(i) * inverse, output_.at(i + 1) * inverse));
      }
    }
    device::warp_barrier();
    Block::store(warp_row(), Traits::kWarpRows, [this](int row, int column) {
      return query_.template load<Chunk>(piece_at(row, column, Traits::kRows));
    });
  }

  static ROTEXPORT_DEVICE int group() { return thread() / Traits::kGroup; }
  static ROTEXPORT_DEVICE void meet_group() { device::named_barrier(group(), Traits::kGroup); }
  static ROTEXPORT_DEVICE int group_row() { return (group() - 1) * Traits::kGroupRows; }
  static ROTEXPORT_DEVICE int warp_row() { return (thread() - Traits::kGroup) / 32 * Traits::kWarpRows; }

  device::Shared<Element> query_;
  device::Shared<RowFacts> facts_;
  bool sloped_;
  Softmax<2, Traits::kKeys> softmax_;
  device::Registers<float, Traits::kKeys / 2> products_;
  device::Registers<uint32_t, Traits::kKeys / 4> weights_;
  device::Registers<float, Traits::kSize / 2> output_;
};

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads, 1)
    warpgroup_prefill(Geometry geometry, PrefillOperands<typename Traits::Element> operands,
                      ROTEXPORT_GRID_CONSTANT TileMaps maps) {
  WarpgroupPrefill<Traits>(geometry, operands, maps).run();
}

}  // namespace sink_window_attention
