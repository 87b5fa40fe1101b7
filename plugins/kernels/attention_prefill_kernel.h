// Sink/window attention for many queries on tensor cores of any architecture.
//
// Each warp keeps kRowTiles tiles of 16 rows with an online softmax. Keys of the next tile arrive while
// values are multiplied, values while keys are.
#pragma once

#include "kernels/attention_prefill_block.h"
#include "kernels/attention_sizes.h"

namespace sink_window_attention {

template <class Element_, int kSize_>
struct PrefillTraits {
  using Element = Element_;
  static constexpr int kSize = kSize_;
  static constexpr int kWarps = kPrefillWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = prefill_row_tiles(kSize);
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarpRows * kWarps;
  static constexpr int kKeys = 64;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kSteps = kSize / 16;
  static constexpr bool kWholeRows = kThreads % (kSize / 8) == 0;  // copied at once by all threads
  static constexpr int kStride = kSize + 8;                        // spreads rows over the banks
  static constexpr unsigned kQueryBytes = kRows * kStride * 2;
  static constexpr unsigned kTileBytes = kKeys * kStride * 2;
  static constexpr unsigned kSharedBytes = kQueryBytes + 2 * kTileBytes;

  static_assert(sizeof(Element) == 2, "tensor cores take 16-bit elements");
  static_assert(kSize % 16 == 0 && kSize <= kLargestHead, "heads are padded to whole matrix tiles");
};

template <class Traits>
class Prefill : PrefillBlock<Traits> {
  using Block = PrefillBlock<Traits>;
  using typename Block::Chunk;
  using typename Block::Element;

 public:
  ROTEXPORT_DEVICE Prefill(const Geometry& geometry, const PrefillOperands<Element>& operands)
      : Block(geometry, operands),
        query_(0),
        key_(Traits::kQueryBytes),
        value_(Traits::kQueryBytes + Traits::kTileBytes) {}

  ROTEXPORT_DEVICE void run() {
    if (begin()) {
      attend();
    } else {
      store(warp_row(), Traits::kWarpRows, Block::zeros);
    }
  }

 private:
  using Block::after;
  using Block::begin;
  using Block::first_tile;
  using Block::g_;
  using Block::lane;
  using Block::operands_;
  using Block::range;
  using Block::store;
  using Block::thread;

  ROTEXPORT_DEVICE void attend() {
    prepare();
    Tile tile = first_tile(kSinks);
    load_queries(tile.part);
    load_keys(tile);
    device::copy_async_commit();
    while (tile.part < kParts) {
      device::copy_async_wait<0>();
      device::barrier();  // keys have landed, and nobody reads the last tile's values
      load_values(tile);
      device::copy_async_commit();
      multiply_keys();
      const Tile next = after(tile);
      device::copy_async_wait<0>();
      device::barrier();  // values have landed, and nobody reads these keys and queries
      if (next.part < kParts) {
        if (tile.part == kSinks && next.part != kSinks) load_queries(next.part);
        load_keys(next);
        device::copy_async_commit();
      }
      weigh(tile);
      multiply_values();
      tile = next;
    }
    finish();
  }

  ROTEXPORT_DEVICE void prepare() {
    sloped_ = Block::prepare_rows(warp_row(), Traits::kWarpRows, [this](int row, const RowFacts& facts) {
      query_.store(facts_at(row), facts);
    });
    softmax_.start();
    ROTEXPORT_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4 * 2 * Traits::kSteps; ++i) output_[r][i / 4][i % 4] = 0;
    }
    // Columns that only exist in the padded size must not hold NaN.
    clear(query_, Traits::kRows, g_.head_size);
    clear(key_, Traits::kKeys, g_.head_size);
    clear(value_, Traits::kKeys, g_.value_size);
  }

  static ROTEXPORT_DEVICE unsigned facts_at(int row) { return row * Traits::kStride + Traits::kSize; }

  ROTEXPORT_DEVICE void clear(const device::Shared<Element>& rows, int count, int width) const {
    const int chunks = (Traits::kSize - width) / 8;
    for (int i = thread(); i < count * chunks; i += Traits::kThreads) {
      rows.store(i / chunks * Traits::kStride + width + i % chunks * 8, Chunk{});
    }
  }

  ROTEXPORT_DEVICE void load_queries(int part) const {
    const Element* from = part == kSinks ? operands_.query_sink : operands_.query;
    ROTEXPORT_ROLL
    for (int i = 0; i < Traits::kRows * Traits::kSize / 8; i += Traits::kThreads) {
      const int at = i + thread();
      const int row = at / (Traits::kSize / 8);
      const int column = at % (Traits::kSize / 8) * 8;
      if (column < g_.head_size) {
        device::copy_async(query_, row * Traits::kStride + column,
                           from + Block::query_row(Block::real_row(row)) * g_.head_size + column);
      }
    }
  }

  ROTEXPORT_DEVICE void load_keys(const Tile& tile) const {
    load_rows(key_, tile, operands_.keys, g_.head_size);
  }
  ROTEXPORT_DEVICE void load_values(const Tile& tile) const {
    load_rows(value_, tile, operands_.values, g_.value_size);
  }

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
  ROTEXPORT_DEVICE void weigh(const Tile& tile) {
    float shrinks[2 * Traits::kRowTiles];
    const bool shrinking = softmax_.weigh(
        g_, Block::mask_of(tile, sloped_),
        [this](int i, int c) -> float& { return products_[i / 2][c / 2][i % 2 * 2 + c % 2]; },
        [this](int i) { return query_.template load<RowFacts>(facts_at(warp_row() + 8 * i + lane() / 4)); },
        shrinks);
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

  // Divides by the sums and stores, through the warp's own rows of the query buffer.
  ROTEXPORT_DEVICE void finish() {
    ROTEXPORT_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      ROTEXPORT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float inverse = softmax_.inverse_sum(2 * r + half);
        const int row = warp_row() + 16 * r + 8 * half + lane() / 4;
        ROTEXPORT_UNROLL
        for (int n = 0; n < 2 * Traits::kSteps; ++n) {
          query_.store(row * Traits::kStride + 8 * n + lane() % 4 * 2,
                       device::pack<Element>(output_[r][n][2 * half] * inverse,
                                             output_[r][n][2 * half + 1] * inverse));
        }
      }
    }
    device::warp_barrier();
    store(warp_row(), Traits::kWarpRows, [this](int row, int column) {
      return query_.template load<Chunk>(row * Traits::kStride + column);
    });
  }

  static ROTEXPORT_DEVICE int warp_row() { return thread() / 32 * Traits::kWarpRows; }

  device::Shared<Element> query_;
  device::Shared<Element> key_;
  device::Shared<Element> value_;
  bool sloped_;
  Softmax<2 * Traits::kRowTiles, Traits::kKeys> softmax_;
  float products_[Traits::kRowTiles][Traits::kKeyTiles][4];
  float output_[Traits::kRowTiles][2 * Traits::kSteps][4];
};

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads, 1)
    prefill(Geometry geometry, PrefillOperands<typename Traits::Element> operands) {
  Prefill<Traits>(geometry, operands).run();
}

}  // namespace sink_window_attention
