// Sink/window attention for many queries on tensor cores.
//
// A thread block takes kRows packed query rows of one key head: token by token, within a token the query
// heads that share the key head, so that a tile of keys and values is read once for all of them. It walks
// over the tiles of the ranges that any of its rows sees, first sinks, then what was staged as dequantized
// codes, then floating point. Each warp keeps kRowTiles tiles of 16 rows with an online softmax. Keys of the
// next tile arrive while values are multiplied, values while keys are.
#pragma once

#include "kernels/attention_keys.h"
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

template <class Traits>
class Prefill {
  using Element = typename Traits::Element;
  using Chunk = Vector<uint32_t, 4>;

 public:
  ROTEXPORT_DEVICE Prefill(const Geometry& geometry, const PrefillOperands<Element>& operands)
      : g_(geometry),
        operands_(operands),
        query_(0),
        key_(Traits::kQueryBytes),
        value_(Traits::kQueryBytes + Traits::kTileBytes) {}

  ROTEXPORT_DEVICE void run() {
    const int first_token = first_row() / g_.repeat;
    const Row row = lengths();
    past_ = row.past;
    if (first_token < row.fresh) {
      attend(first_token, row);
    } else {
      store([](int, int) { return Chunk{}; });
    }
  }

 private:
  // A tile of a range: its first key. `part` is kParts behind the last.
  struct Tile {
    int part;
    int first;
  };

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

  ROTEXPORT_DEVICE void attend(int first_token, const Row& row) {
    const int last_token = (first_row() + Traits::kRows - 1) / g_.repeat;
    first_query_ = row.past + first_token;
    last_query_ = row.past + (last_token < row.fresh ? last_token : row.fresh - 1);
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
    sloped_ = false;
    for (int i = lane(); i < Traits::kWarpRows; i += 32) {
      const RowFacts facts = facts_of(g_, operands_.decay, past_, key_head(), first_row() + warp_row() + i);
      query_.store(facts_at(warp_row() + i), facts);
      sloped_ |= facts.slope != 0;
    }
    sloped_ = device::any(sloped_);
    device::warp_barrier();
    ROTEXPORT_UNROLL
    for (int r = 0; r < 2 * Traits::kRowTiles; ++r) {
      maximum_[r] = kHidden;
      sum_[r] = 0;
    }
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
    const int last_row = (last_query_ - past_ + 1) * g_.repeat - 1;
    ROTEXPORT_ROLL
    for (int i = 0; i < Traits::kRows * Traits::kSize / 8; i += Traits::kThreads) {
      const int at = i + thread();
      const int row = at / (Traits::kSize / 8);
      const int column = at % (Traits::kSize / 8) * 8;
      const int packed = first_row() + row < last_row ? first_row() + row : last_row;
      if (column < g_.head_size) {
        device::copy_async(query_, row * Traits::kStride + column,
                           from + query_row(packed) * g_.head_size + column);
      }
    }
  }

  // Index of a packed row among the rows of queries and outputs.
  ROTEXPORT_DEVICE int64_t query_row(int packed) const {
    const int64_t head = int64_t{key_head()} * g_.repeat + packed % g_.repeat;
    return head * g_.tokens + packed / g_.repeat;
  }

  ROTEXPORT_DEVICE void load_keys(const Tile& tile) const {
    load_rows(key_, tile, operands_.keys, g_.head_size);
  }
  ROTEXPORT_DEVICE void load_values(const Tile& tile) const {
    load_rows(value_, tile, operands_.values, g_.value_size);
  }

  // Rows behind the range's last one repeat it: they are hidden, but must be finite where the others are.
  ROTEXPORT_DEVICE void load_rows(const device::Shared<Element>& to, const Tile& tile,
                                  const Held<Element> (&held)[kParts], int width) const {
    const int slots = tile.part == kSinks                     ? g_.sink_slots
                      : tile.part == kFar || !operands_.coded ? g_.window
                                                              : g_.recent;
    const bool all_fresh = tile.first >= past_;
    const Places places =
        tile.part == kSinks || all_fresh ? sink_places(past_, slots) : ring_places(past_, g_.sinks, slots);
    const Held<Element>& part = held[tile.part == kSinks ? kSinks : tile.part == kFar ? kFar : kNear];
    const int64_t head = key_head();
    const Range range = this->range(tile.part);
    const auto address = [&](int j) {
      return places.is_fresh(j) ? part.fresh + (head * g_.tokens + places.token(j)) * width
                                : part.slots + (head * slots + places.slot(j)) * width;
    };
    const int last = tile.first + Traits::kKeys - 1;
    const bool straight =
        all_fresh || (last < past_ && places.slot(last) - places.slot(tile.first) == Traits::kKeys - 1);
    if (Traits::kWholeRows && straight && last <= range.last && width == Traits::kSize) {
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

  // products_ become weights: powers of two against the rows' maxima, to which the output is brought too.
  ROTEXPORT_DEVICE void weigh(const Tile& tile) {
    const Range range = this->range(tile.part);
    const int last_key = tile.first + Traits::kKeys - 1;
    const bool whole = range.shows_all(first_query_, last_query_, tile.first, last_key);
    const bool slopes = sloped_ && tile.part != kSinks;
    const Curve curve(g_);
    const bool plain = whole && !slopes && !(curve.cap > 0);
    float shrinks[2 * Traits::kRowTiles];
    bool shrinking = false;
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2 * Traits::kRowTiles; ++i) {
      if (!plain) bend(i, curve, range, tile.first, slopes);
      const float factor = plain ? curve.factor : 1.0f;
      float largest = kHidden;
      for_each_product(i, [&](float& x, int) { largest = larger(largest, x); });
      largest = larger(maximum_[i], largest_of_quad(largest) * factor);
      const float reference = reference_of(largest);
      shrinks[i] = device::exp2(maximum_[i] - reference);
      shrinking |= largest != maximum_[i];
      maximum_[i] = largest;
      float sum = 0;
      for_each_product(i, [&](float& x, int) {
        x = device::exp2(x * factor - reference);
        sum += x;
      });
      sum_[i] = sum_[i] * shrinks[i] + sum;
    }
    if (!device::any(shrinking)) return;
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2 * Traits::kRowTiles; ++i) {
      ROTEXPORT_UNROLL
      for (int n = 0; n < 2 * Traits::kSteps; ++n) {
        output_[i / 2][n][i % 2 * 2] *= shrinks[i];
        output_[i / 2][n][i % 2 * 2 + 1] *= shrinks[i];
      }
    }
  }

  // Products of a row become logits, hidden ones -infinity.
  ROTEXPORT_DEVICE void bend(int i, const Curve& curve, const Range& range, int first, bool slopes) {
    const auto facts = query_.template load<RowFacts>(facts_at(warp_row() + 8 * i + lane() / 4));
    const int first_key = first + lane() % 4 * 2;
    const float slope = slopes ? facts.slope : 0.0f;
    const float nearest = slope * static_cast<float>(first_key - facts.position);
    for_each_product(i, [&](float& x, int key) {
      x = curve(x) + nearest + slope * static_cast<float>(key);
      if (!range.shows(facts.position, first_key + key)) x = kHidden;
    });
  }

  // Calls visit(product, key - first key of this lane) for row 8 i + lane / 4 of the warp.
  template <class Visit>
  ROTEXPORT_DEVICE void for_each_product(int i, const Visit& visit) {
    ROTEXPORT_UNROLL
    for (int n = 0; n < Traits::kKeyTiles; ++n) {
      visit(products_[i / 2][n][i % 2 * 2], 8 * n);
      visit(products_[i / 2][n][i % 2 * 2 + 1], 8 * n + 1);
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
        const float inverse = 1.0f / sum_of_quad(sum_[2 * r + half]);
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
    store(
        [this](int row, int column) { return query_.template load<Chunk>(row * Traits::kStride + column); });
  }

  // Writes the warp's rows: value(row, column) for real tokens, zeros for padding.
  template <class Value>
  ROTEXPORT_DEVICE void store(const Value& value) const {
    const int rows = g_.tokens * g_.repeat;
    const int fresh = lengths().fresh;
    const device::Global<Element> output(operands_.output);
    for (int i = lane(); i < Traits::kWarpRows * (Traits::kSize / 8); i += 32) {
      const int row = warp_row() + i / (Traits::kSize / 8);
      const int column = i % (Traits::kSize / 8) * 8;
      const int packed = first_row() + row;
      if (packed >= rows || column >= g_.value_size) continue;
      const bool real = packed / g_.repeat < fresh;
      output.from(query_row(packed) * g_.value_size).store(column, real ? value(row, column) : Chunk{});
    }
  }

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
  static ROTEXPORT_DEVICE int warp_row() { return thread() / 32 * Traits::kWarpRows; }

  const Geometry& g_;
  const PrefillOperands<Element>& operands_;
  device::Shared<Element> query_;
  device::Shared<Element> key_;
  device::Shared<Element> value_;
  int past_;
  int first_query_;
  int last_query_;
  bool sloped_;
  float maximum_[2 * Traits::kRowTiles];
  float sum_[2 * Traits::kRowTiles];
  float products_[Traits::kRowTiles][Traits::kKeyTiles][4];
  float output_[Traits::kRowTiles][2 * Traits::kSteps][4];
};

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads, 1)
    prefill(Geometry geometry, PrefillOperands<typename Traits::Element> operands) {
  Prefill<Traits>(geometry, operands).run();
}

}  // namespace sink_window_attention
