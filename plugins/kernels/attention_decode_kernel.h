// Sink/window attention for a few queries at the speed at which the cache can be read.
//
// A thread block takes 16 packed query rows of one key head (see attention_query_block.h) and one of
// Geometry::splits parts of the tiles of keys that they see. Each warp works alone: it copies its next tile,
// codes as they are, to shared memory while it multiplies the last one, and widens codes in registers. Tensor
// cores sum over channels in any order, as long as queries and keys agree: a lane takes eight neighbouring
// channels of a key, and eight neighbouring columns of the values. The block then merges its warps' sums and
// writes them with their maxima for the launch that combines all parts.
#pragma once

#include "kernels/attention_decode_sums.h"

namespace sink_window_attention {

template <class Traits>
class Decode : DecodeSums<Traits> {
  using Tiles = DecodeSums<Traits>;
  using typename Tiles::Chunk;
  using typename Tiles::Element;

 public:
  ROTEXPORT_DEVICE Decode(const Geometry& geometry, const DecodeOperands<Element>& operands)
      : Tiles(geometry, operands) {}

  ROTEXPORT_DEVICE void run() {
    const int first_token = first_row() / g_.repeat;
    if (first_token >= row_.fresh) return;
    prepare(first_token);
    const int each =
        (end_tile_ + g_.splits * Traits::kWarps - 1) / (g_.splits * Traits::kWarps) * Traits::kWarps;
    const int end = (split() + 1) * each < end_tile_ ? (split() + 1) * each : end_tile_;
    const int first = split() * each + warp();
    int held_part = kParts;
    // Each turn starts to copy a tile, and multiplies the one that was started a turn ago.
    for (int tile = first - Traits::kWarps, stage = 1; tile < end; tile += Traits::kWarps, stage ^= 1) {
      if (tile + Traits::kWarps < end) start_copy(tile + Traits::kWarps, stage ^ 1);
      device::copy_async_commit();
      if (tile < first) continue;
      device::copy_async_wait<1>();
      const Part part = part_of(tile);
      if (part == kFar) pick_scales(tile, stage);
      device::warp_barrier();
      if (part != held_part) load_queries(part);
      held_part = part;
      if (part == kFar) {
        attend<Traits::kFormat>(part, tile, stage);
      } else {
        attend<Format::kFloat>(part, tile, stage);
      }
      device::warp_barrier();  // before the next copy to this stage
    }
    device::copy_async_wait<0>();
    Tiles::merge();
  }

 private:
  using Tiles::cache_head;
  using Tiles::end_tile_;
  using Tiles::facts_;
  using Tiles::first_row;
  using Tiles::first_tile;
  using Tiles::g_;
  using Tiles::lane;
  using Tiles::last_query_;
  using Tiles::maximum_;
  using Tiles::operands_;
  using Tiles::output_;
  using Tiles::part_of;
  using Tiles::pick_scales;
  using Tiles::queries_;
  using Tiles::range;
  using Tiles::row_;
  using Tiles::shrink;
  using Tiles::split;
  using Tiles::start_copy;
  using Tiles::sum_;
  using Tiles::warp;

  ROTEXPORT_DEVICE void prepare(int first_token) {
    Tiles::begin(first_token);
    if (lane() < kDecodeRows) {
      facts_.store(lane(), facts_of(g_, operands_.decay, row_.past, cache_head(), first_row() + lane()));
    }
    device::warp_barrier();
    Tiles::start();
  }

  // Index of one of the block's rows among all queries: rows behind the last one repeat it.
  ROTEXPORT_DEVICE int64_t query_row(int row) const {
    const int last_row = (last_query_ - row_.past + 1) * g_.repeat - 1;
    const int packed = first_row() + row < last_row ? first_row() + row : last_row;
    return attention::query_row(g_, cache_head(), packed);
  }

  // The queries' channels in the order in which keys of the part are widened.
  ROTEXPORT_DEVICE void load_queries(Part part) {
    device::Global<const Element> rows[2];
    const Element* from = part == kSinks ? operands_.query_sink : operands_.query;
    ROTEXPORT_UNROLL
    for (int r = 0; r < 2; ++r) {
      rows[r] = device::Global<const Element>(from + query_row(8 * r + lane() / 4) * g_.head_size);
    }
    ROTEXPORT_UNROLL
    for (int u = 0; u < Traits::kUnits; ++u) {
      const int channel = 32 * u + lane() % 4 * 8;
      Chunk steps[2];
      ROTEXPORT_UNROLL
      for (int r = 0; r < 2; ++r) {
        Chunk words = {};
        if (channel < g_.head_size) words = rows[r].template load<Chunk>(channel);
        reorder(words, part == kFar ? Traits::kFormat : Format::kFloat);
        ROTEXPORT_UNROLL
        for (int i = 0; i < 4; ++i) steps[i / 2].values[i % 2 * 2 + r] = words.values[i];
      }
      ROTEXPORT_UNROLL
      for (int step = 0; step < 2; ++step) {
        if constexpr (Traits::kQueriesShared) {
          queries_.store(query_at(u, step), steps[step]);
        } else {
          ROTEXPORT_UNROLL
          for (int i = 0; i < 4; ++i) query_[u][step][i] = steps[step].values[i];
        }
      }
    }
  }

  // A lane's own 16 bytes: no other lane reads them.
  static ROTEXPORT_DEVICE unsigned query_at(int unit, int step) {
    return ((unit * 2 + step) * 32 + lane()) * 4;
  }

  ROTEXPORT_DEVICE void multiply_step(float (&products)[4], int unit, int step,
                                      const uint32_t (&keys)[2]) const {
    if constexpr (Traits::kQueriesShared) {
      const Chunk held = queries_.template load<Chunk>(query_at(unit, step));
      const uint32_t rows[4] = {held.values[0], held.values[1], held.values[2], held.values[3]};
      device::multiply_add<Element>(products, rows, keys);
    } else {
      device::multiply_add<Element>(products, query_[unit][step], keys);
    }
  }

  // Pairs of neighbours become pairs of what lies in the two halves of a word of codes.
  static ROTEXPORT_DEVICE void reorder(Chunk& words, Format format) {
    const Chunk w = words;
    if (bits_of(format) == 8) {
      words = {{low_halves(w.values[0], w.values[1]), high_halves(w.values[0], w.values[1]),
                low_halves(w.values[2], w.values[3]), high_halves(w.values[2], w.values[3])}};
    } else if (format != Format::kFloat) {
      words = {{low_halves(w.values[0], w.values[2]), high_halves(w.values[0], w.values[2]),
                low_halves(w.values[1], w.values[3]), high_halves(w.values[1], w.values[3])}};
    }
  }

  template <Format kFormat>
  ROTEXPORT_DEVICE void attend(Part part, int tile, int stage) {
    const Range range = this->range(part);
    const int first = range.first + (tile - first_tile(part)) * tile_keys(kFormat);
    ROTEXPORT_ROLL
    for (int slice = 0; slice < tile_keys(kFormat) && first + slice <= range.last; slice += 16) {
      start_products<kFormat>(first + slice);
      multiply_keys<kFormat>(stage, slice);
      weigh(part, range, first + slice);
      multiply_values<kFormat>(stage, slice);
    }
  }

  // Zero, or what the mean of centered keys adds.
  template <Format kFormat>
  ROTEXPORT_DEVICE void start_products(int first) {
    ROTEXPORT_UNROLL
    for (int i = 0; i < 8; ++i) products_[i / 4][i % 4] = 0;
    if constexpr (has_levels(kFormat)) {
      if (operands_.means == nullptr) return;
      const int rows = g_.tokens * g_.repeat;
      const int own = first_row() + lane() / 4;
      const auto products = device::Global<const float>(operands_.means)
                                .from((int64_t{cache_head()} * rows + own) * mean_row(g_));
      const int key = first - row_.past + g_.window + lane() % 4 * 2;
      ROTEXPORT_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (own + 8 * half >= rows) continue;
        ROTEXPORT_UNROLL
        for (int i = 0; i < 4; ++i) {
          products_[i / 2][i % 2 + 2 * half] =
              products.template load<float>(8 * half * mean_row(g_) + key + 8 * (i / 2) + i % 2);
        }
      }
    }
  }

  // Adds to products_.
  template <Format kFormat>
  ROTEXPORT_DEVICE void multiply_keys(int stage, int slice) {
    ROTEXPORT_UNROLL_BY(Traits::kQueriesShared ? 1 : Traits::kUnits)
    for (int u = 0; u < Traits::kUnits; ++u) {
      if (32 * u >= g_.head_size) continue;
      const int channel = 32 * u + lane() % 4 * 8;
      ROTEXPORT_UNROLL
      for (int n = 0; n < 2; ++n) {
        uint32_t keys[2][2] = {};
        if (channel < g_.head_size)
          this->template widen_key<kFormat>(keys, stage, slice + 8 * n + lane() / 4, channel);
        multiply_step(products_[n], u, 0, keys[0]);
        multiply_step(products_[n], u, 1, keys[1]);
      }
    }
  }

  ROTEXPORT_DEVICE void weigh(Part part, const Range& range, int first) {
    const Curve curve(g_);
    const int first_key = first + lane() % 4 * 2;
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto facts = facts_.template load<RowFacts>(8 * half + lane() / 4);
      const float slope = part == kSinks ? 0.0f : facts.slope;
      float largest = maximum_[half];
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& x = products_[i / 2][i % 2 + 2 * half];
        const int j = first_key + 8 * (i / 2) + i % 2;
        x = curve(x) - slope * static_cast<float>(facts.position - j);
        if (!range.shows(facts.position, j)) x = kHidden;
        largest = larger(largest, x);
      }
      largest = largest_of_quad(largest);
      const float reference = reference_of(largest);
      if (device::any(largest != maximum_[half])) shrink(half, device::exp2(maximum_[half] - reference));
      maximum_[half] = largest;
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& x = products_[i / 2][i % 2 + 2 * half];
        x = device::exp2(x - reference);
        sum_[half] += x;
      }
    }
  }

  template <Format kFormat>
  ROTEXPORT_DEVICE void multiply_values(int stage, int slice) {
    uint32_t weights[4];
    ROTEXPORT_UNROLL
    for (int i = 0; i < 4; ++i) {
      weights[i] = device::pack<Element>(products_[i / 2][i % 2 * 2], products_[i / 2][i % 2 * 2 + 1]);
    }
    ROTEXPORT_UNROLL
    for (int v = 0; v < Traits::kColumns; ++v) {
      if (64 * v >= g_.value_size) continue;
      const int column = 64 * v + lane() / 4 * 8;
      uint32_t values[2][8] = {};
      if (column < g_.value_size) {
        ROTEXPORT_UNROLL
        for (int k = 0; k < 2; ++k)
          this->template widen_values<kFormat>(values[k], stage, slice + 8 * k + lane() % 4 * 2, column);
      }
      ROTEXPORT_UNROLL
      for (int n = 0; n < 8; ++n) {
        const uint32_t pair[2] = {values[0][n], values[1][n]};
        device::multiply_add<Element>(output_[8 * v + n], weights, pair);
      }
    }
  }

  uint32_t query_[Traits::kQueriesShared ? 1 : Traits::kUnits][2][4];
  float products_[2][4];
};

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads, 1)
    decode(Geometry geometry, DecodeOperands<typename Traits::Element> operands) {
  Decode<Traits>(geometry, operands).run();
}

}  // namespace sink_window_attention
