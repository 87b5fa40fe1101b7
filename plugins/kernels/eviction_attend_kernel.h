// Attention of the call's queries to sinks, slots and the call's own tokens, on tensor cores.
//
// A call of few tokens leaves warps without rows, which only copy: reading is what takes time. Its logits,
// and the norms of the values that it reads, are kept, so that the cache is read once.
#pragma once

#include "kernels/attention_tiles.h"
#include "kernels/eviction_attend_block.h"

namespace eviction {

template <class Element, int kSize>
struct AttendTraits : TileTraits<Element, kSize, 1> {
  using Tiles = TileTraits<Element, kSize, 1>;
  static constexpr bool kSplits = true;

  static_assert(Tiles::kRows == kTile && Tiles::kKeys == kTile, "what the planner counts");
  static_assert(Tiles::kSharedBytes <= 99 * 1024, "three tiles fit into any device's memory");
};

template <class Traits>
class Attend : TileAttention<Attend<Traits>, AttendBlock<Traits>, Traits> {
  using Attention = TileAttention<Attend<Traits>, AttendBlock<Traits>, Traits>;
  using Block = AttendBlock<Traits>;
  using typename Block::Chunk;
  using typename Block::Element;
  using typename Block::Tile;
  friend Attention;

 public:
  ROTEXPORT_DEVICE Attend(const Geometry& geometry, const Rules& rules, const Views<Element>& views)
      : Attention(geometry, rules, views) {}

  ROTEXPORT_DEVICE void run() {
    if (Block::begin()) {
      Attention::attend();
      g_.splits == 1 ? finish() : store_part();
    } else if (g_.splits == 1) {
      Block::store(Attention::warp_row(), Traits::kWarpRows, Block::zeros);
    }
  }

 private:
  using Attention::g_;
  using Attention::lane;
  using Attention::lane_row;
  using Attention::softmax_;
  using Attention::thread;
  using Attention::value_;
  using Attention::views_;

  ROTEXPORT_DEVICE void load_keys(const Tile& tile) const {
    const Cache& cache = views_.cache;
    Block::load_rows(this->key_, tile, tile.meets_sinks() ? cache.sink_key : cache.window_key, views_.key,
                     g_.head_size);
  }

  // The values of a tile, and its keys' positions.
  ROTEXPORT_DEVICE void load_values(const Tile& tile) const {
    const Cache& cache = views_.cache;
    Block::load_rows(value_, tile, tile.meets_sinks() ? cache.sink_value : cache.window_value, views_.value,
                     g_.value_size);
    if (thread() < kTile) value_.store(note_at<Traits>(thread()), Block::position(tile, thread()));
  }
  ROTEXPORT_DEVICE int position(int key) const { return value_.template load<int>(note_at<Traits>(key)); }

  template <class Product, int kRows>
  ROTEXPORT_DEVICE bool weigh(const Tile& tile, const Product& product, float (&shrinks)[kRows]) {
    const Curve curve(g_);
    const bool plain = !keeps_logits() && !(curve.cap > 0) && !this->sloped_ && Block::shows_all(tile);
    const auto bend = [&](int i) { this->bend(i, curve, tile, product); };
    return softmax_.weigh(curve, plain, product, bend, shrinks);
  }

  // Products of row i become logits, hidden ones -infinity. Those of real queries are kept where few are.
  template <class Product>
  ROTEXPORT_DEVICE void bend(int i, const Curve& curve, const Tile& tile, const Product& product) const {
    const bool sinks = tile.meets_sinks();
    const int reach = sinks ? int{kForever} : this->rules_.context;
    const RowFacts facts = Attention::lane_facts(i);
    const float slope = sinks ? 0.0f : facts.slope;
    const bool keeps = keeps_logits() && !sinks && is_real(lane_row(i));
    const auto logits = row_of(views_.scratch.logits, i, g_.window + g_.tokens).from(Block::column(tile));
    const int first_key = lane() % 4 * 2;
    softmax_.for_each(i, product, [&](float& x, int key) {
      const int j = position(first_key + key);
      const int distance = facts.position - j;
      const bool seen = distance >= 0 && distance < reach;
      x = seen ? curve(x) - slope * static_cast<float>(distance) : kHidden;
      if (keeps && j <= this->last_query_) logits.store(first_key + key, x);
    });
  }

  // Norms of the tile's values: eight lanes take one.
  ROTEXPORT_DEVICE void leave(const Tile& tile) const {
    if (!keeps_logits() || tile.meets_sinks()) return;
    const auto norms = device::Global<float>(views_.scratch.norm)
                           .from(int64_t{Block::key_head()} * (g_.window + g_.tokens) + Block::column(tile));
    ROTEXPORT_ROLL
    for (int i = thread() / 8; i < kTile; i += Traits::kThreads / 8) {
      float sum = 0;
      ROTEXPORT_UNROLL
      for (int channel = thread() % 8 * 8; channel < Traits::kSize; channel += 64) {
        sum += sum_of_squares<Element>(value_.template load<Chunk>(i * Traits::kStride + channel));
      }
      sum = sum_of_eight(sum);
      if (thread() % 8 == 0 && position(i) <= this->last_query_) norms.store(i, sqrtf(sum));
    }
  }

  ROTEXPORT_DEVICE void finish() {
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Vector<float, 2> stats = {{softmax_.maximum(i), softmax_.sum(i)}};
      if (lane() % 4 == 0 && is_real(lane_row(i))) row_of(views_.scratch.stats, i, 2).store(0, stats);
    }
    Attention::store_output();
  }

  // Leaves sums, maxima and what to divide by for the launch that combines all parts.
  ROTEXPORT_DEVICE void store_part() const {
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Vector<float, 2> weights = {{softmax_.maximum(i), softmax_.sum(i)}};
      if (!is_real(lane_row(i))) continue;
      const auto sums = row_of(views_.scratch.parts.sums, i, g_.splits * g_.value_size)
                            .from(Block::split() * g_.value_size);
      ROTEXPORT_UNROLL
      for (int n = 0; n < 2 * Traits::kSteps; ++n) {
        const int column = 8 * n + lane() % 4 * 2;
        const Vector<float, 2> pair = {{this->output_[0][n][2 * i], this->output_[0][n][2 * i + 1]}};
        if (column < g_.value_size) sums.store(column, pair);
      }
      if (lane() % 4 == 0) {
        row_of(views_.scratch.parts.weights, i, 2 * g_.splits).store(2 * Block::split(), weights);
      }
    }
  }

  // Numbers of row i of the lane, of which every packed row of every key head has `count`.
  ROTEXPORT_DEVICE device::Global<float> row_of(float* numbers, int i, int count) const {
    const int64_t packed =
        int64_t{Block::key_head()} * g_.tokens * g_.repeat + Block::first_row() + lane_row(i);
    return device::Global<float>(numbers).from(packed * count);
  }

  ROTEXPORT_DEVICE bool keeps_logits() const { return views_.scratch.logits != nullptr; }

  // Whether a row of this block is one of a token, and whether this warp has one.
  ROTEXPORT_DEVICE bool is_real(int row) const {
    return Block::first_row() + row < (this->last_query_ - this->past_ + 1) * g_.repeat;
  }
  ROTEXPORT_DEVICE bool has_rows() const { return is_real(Attention::warp_row()); }
};

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads, 1)
    attend(Geometry geometry, Rules rules, Views<typename Traits::Element> views) {
  Attend<Traits>(geometry, rules, views).run();
}

}  // namespace eviction
