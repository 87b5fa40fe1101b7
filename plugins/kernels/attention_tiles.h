// Attention of a block's query rows to one tile of keys after the other on mma.sync, the tensor cores of
// every architecture.
//
// Each warp keeps kRowTiles tiles of 16 rows with an online softmax. Keys of the next tile arrive while
// values are multiplied, values while keys are.
#pragma once

#include "kernels/attention_softmax.h"

namespace attention {

template <class Element_, int kSize_, int kRowTiles_>
struct TileTraits {
  using Element = Element_;
  static constexpr int kSize = kSize_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarpRows * kWarps;
  static constexpr int kKeys = 64;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kSteps = kSize / 16;
  static constexpr int kStride = kSize + 8;  // spreads rows over the banks, and holds what is known of a row
  static constexpr unsigned kQueryBytes = kRows * kStride * 2;
  static constexpr unsigned kTileBytes = kKeys * kStride * 2;
  static constexpr unsigned kSharedBytes = kQueryBytes + 2 * kTileBytes;

  static_assert(sizeof(Element) == 2, "tensor cores take 16-bit elements");
  static_assert(kSize % 16 == 0 && kSize <= kLargestHead, "heads are padded to whole matrix tiles");
};

// What is known of a row of shared memory lies behind it.
template <class Traits>
ROTEXPORT_DEVICE unsigned note_at(int row) {
  return row * Traits::kStride + Traits::kSize;
}

// Clears columns of rows that only exist in the padded size: they must not hold NaN.
template <class Traits>
ROTEXPORT_DEVICE void clear_padding(const device::Shared<typename Traits::Element>& rows, int count,
                                    int width) {
  const int chunks = (Traits::kSize - width) / 8;
  for (int i = static_cast<int>(device::thread_index()); i < count * chunks; i += Traits::kThreads) {
    rows.store(i / chunks * Traits::kStride + width + i % chunks * 8, Vector<uint32_t, 4>{});
  }
}

// Block is a QueryBlock that knows its tiles: a type Tile with exists() and meets_sinks(), Tile first_tile()
// and Tile after(tile). Kernel derives from this and says
//
//   bool has_rows() const                              whether the warp has rows to multiply
//   void load_keys(tile), load_values(tile)            starts to copy them to key_ and value_
//   bool weigh(tile, product, shrinks)                 see Softmax
//   void leave(tile)                                   the tile's values are still there
template <class Kernel, class Block, class Traits>
class TileAttention : protected Block {
 protected:
  using Block::g_;
  using Block::lane;
  using Block::thread;
  using Block::views_;
  using typename Block::Chunk;
  using typename Block::Element;
  using typename Block::Tile;

  template <class... Arguments>
  ROTEXPORT_DEVICE explicit TileAttention(const Arguments&... of_block)
      : Block(of_block...),
        query_(0),
        key_(Traits::kQueryBytes),
        value_(Traits::kQueryBytes + Traits::kTileBytes) {}

  // Sums up all tiles.
  ROTEXPORT_DEVICE void attend() {
    prepare();
    Tile tile = Block::first_tile();
    if (Traits::kSplits && !tile.exists()) return;  // of its part of the keys; of all it sees itself
    load_queries(tile);
    kernel().load_keys(tile);
    device::copy_async_commit();
    do {
      device::copy_async_wait<0>();
      device::barrier();  // keys have landed, and nobody reads the last tile's values
      kernel().load_values(tile);
      device::copy_async_commit();
      if (kernel().has_rows()) multiply_keys();
      const Tile next = Block::after(tile);
      device::copy_async_wait<0>();
      device::barrier();  // values have landed, and nobody reads these keys and queries
      if (next.exists()) {
        if (tile.meets_sinks() && !next.meets_sinks()) load_queries(next);
        kernel().load_keys(next);
        device::copy_async_commit();
      }
      if (kernel().has_rows()) {
        weigh_tile(tile);
        multiply_values();
      }
      kernel().leave(tile);
      tile = next;
    } while (tile.exists());
  }

  // Divides by the sums and stores, through the warp's own rows of the query buffer.
  ROTEXPORT_DEVICE void store_output() {
    ROTEXPORT_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      ROTEXPORT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float inverse = softmax_.inverse_sum(2 * r + half);
        const int row = lane_row(2 * r + half);
        ROTEXPORT_UNROLL
        for (int n = 0; n < 2 * Traits::kSteps; ++n) {
          query_.store(row * Traits::kStride + 8 * n + lane() % 4 * 2,
                       device::pack<Element>(output_[r][n][2 * half] * inverse,
                                             output_[r][n][2 * half + 1] * inverse));
        }
      }
    }
    device::warp_barrier();
    Block::store(warp_row(), Traits::kWarpRows, [this](int row, int column) {
      return query_.template load<Chunk>(row * Traits::kStride + column);
    });
  }

  static ROTEXPORT_DEVICE int warp_row() { return thread() / 32 * Traits::kWarpRows; }
  // The row of the block that is row i of the lane.
  static ROTEXPORT_DEVICE int lane_row(int i) { return warp_row() + 8 * i + lane() / 4; }
  ROTEXPORT_DEVICE RowFacts lane_facts(int i) const {
    return query_.template load<RowFacts>(note_at<Traits>(lane_row(i)));
  }

  device::Shared<Element> query_;
  device::Shared<Element> key_;
  device::Shared<Element> value_;
  bool sloped_;  // logits of some row of the warp decay
  Softmax<2 * Traits::kRowTiles, Traits::kKeys> softmax_;
  float output_[Traits::kRowTiles][2 * Traits::kSteps][4];

 private:
  ROTEXPORT_DEVICE Kernel& kernel() { return static_cast<Kernel&>(*this); }

  ROTEXPORT_DEVICE void prepare() {
    sloped_ = Block::prepare_rows(warp_row(), Traits::kWarpRows, [this](int row, const RowFacts& facts) {
      query_.store(note_at<Traits>(row), facts);
    });
    softmax_.start();
    ROTEXPORT_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4 * 2 * Traits::kSteps; ++i) output_[r][i / 4][i % 4] = 0;
    }
    clear_padding<Traits>(query_, Traits::kRows, g_.head_size);
    clear_padding<Traits>(key_, Traits::kKeys, g_.head_size);
    clear_padding<Traits>(value_, Traits::kKeys, g_.value_size);
  }

  ROTEXPORT_DEVICE void load_queries(const Tile& tile) const {
    const Element* from = tile.meets_sinks() ? views_.query_sink : views_.query;
    ROTEXPORT_ROLL
    for (int i = 0; i < Traits::kRows * Traits::kSize / 8; i += Traits::kThreads) {
      const int at = i + thread();
      const int row = at / (Traits::kSize / 8);
      const int column = at % (Traits::kSize / 8) * 8;
      if (column < g_.head_size) {
        device::copy_async(query_, row * Traits::kStride + column,
                           from + Block::real_query(row) * g_.head_size + column);
      }
    }
  }

  // products_ = queries . keys
  ROTEXPORT_DEVICE void multiply_keys() {
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kRowTiles * Traits::kKeyTiles * 4; ++i) (&products_[0][0][0])[i] = 0;
    ROTEXPORT_UNROLL
    for (int k = 0; k < Traits::kSteps; ++k) {
      uint32_t rows[Traits::kRowTiles][4];
      ROTEXPORT_UNROLL
      for (int r = 0; r < Traits::kRowTiles; ++r) {
        const int row = warp_row() + 16 * r + lane() % 16;
        device::load_matrices(rows[r], query_, row * Traits::kStride + 16 * k + lane() / 16 * 8);
      }
      ROTEXPORT_UNROLL
      for (int n = 0; n < Traits::kKeyTiles; n += 2) {
        uint32_t keys[4];
        const int key = 8 * n + lane() % 8 + lane() / 16 * 8;
        device::load_matrices(keys, key_, key * Traits::kStride + 16 * k + lane() / 8 % 2 * 8);
        const uint32_t pair[2][2] = {{keys[0], keys[1]}, {keys[2], keys[3]}};
        ROTEXPORT_UNROLL
        for (int r = 0; r < Traits::kRowTiles; ++r) {
          device::multiply_add<Element>(products_[r][n], rows[r], pair[0]);
          device::multiply_add<Element>(products_[r][n + 1], rows[r], pair[1]);
        }
      }
    }
  }

  // products_ become weights, and the output is brought to the maxima that they were taken against.
  ROTEXPORT_DEVICE void weigh_tile(const Tile& tile) {
    float shrinks[2 * Traits::kRowTiles];
    const bool shrinking = kernel().weigh(
        tile, [this](int i, int c) -> float& { return products_[i / 2][c / 2][i % 2 * 2 + c % 2]; }, shrinks);
    if (!shrinking) return;
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2 * Traits::kRowTiles; ++i) {
      ROTEXPORT_UNROLL
      for (int n = 0; n < 2 * Traits::kSteps; ++n) {
        output_[i / 2][n][i % 2 * 2] *= shrinks[i];
        output_[i / 2][n][i % 2 * 2 + 1] *= shrinks[i];
      }
    }
  }

  // output_ += weights . values
  ROTEXPORT_DEVICE void multiply_values() {
    ROTEXPORT_UNROLL
    for (int k = 0; k < Traits::kKeys / 16; ++k) {
      uint32_t weights[Traits::kRowTiles][4];
      ROTEXPORT_UNROLL
      for (int r = 0; r < Traits::kRowTiles; ++r) {
        ROTEXPORT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float (&pair)[4] = products_[r][2 * k + i / 2];
          weights[r][i] = device::pack<Element>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
      }
      ROTEXPORT_UNROLL
      for (int n = 0; n < Traits::kSteps; ++n) {
        uint32_t values[4];
        device::load_matrices_transposed(values, value_,
                                         (16 * k + lane() % 16) * Traits::kStride + 16 * n + lane() / 16 * 8);
        const uint32_t pair[2][2] = {{values[0], values[1]}, {values[2], values[3]}};
        ROTEXPORT_UNROLL
        for (int r = 0; r < Traits::kRowTiles; ++r) {
          device::multiply_add<Element>(output_[r][2 * n], weights[r], pair[0]);
          device::multiply_add<Element>(output_[r][2 * n + 1], weights[r], pair[1]);
        }
      }
    }
  }

  float products_[Traits::kRowTiles][Traits::kKeyTiles][4];
};

}  // namespace attention
