// Attention of the call's queries to sinks, slots and the call's own tokens, on tensor cores.
//
// A thread block takes kTile packed query rows of one key head: token by token, within a token the query
// heads that share the key head. It walks over one of Geometry::splits parts of the tiles of keys that any of
// its rows sees: sinks, then slots, of which it passes over tiles without a token, then new tokens. Each warp
// keeps 16 rows with an online softmax. Keys of the next tile arrive while values are multiplied, values
// while keys are. A call of few tokens leaves warps without rows, which only copy: reading is what takes
// time. Its logits, and the norms of the values that it reads, are kept, so that the cache is read once.
#pragma once

#include "kernels/eviction_tokens.h"

namespace eviction {

template <class Element_, int kSize_>
struct AttendTraits {
  using Element = Element_;
  static constexpr int kSize = kSize_;
  static constexpr int kWarps = kTile / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeyTiles = kTile / 8;
  static constexpr int kSteps = kSize / 16;
  static constexpr int kStride = kSize + 8;  // spreads rows over the banks, and holds what is known of a row
  static constexpr unsigned kTileBytes = kTile * kStride * 2;
  static constexpr unsigned kSharedBytes = 3 * kTileBytes;

  static_assert(sizeof(Element) == 2, "tensor cores take 16-bit elements");
  static_assert(kSize % 16 == 0 && kSharedBytes <= 99 * 1024, "three tiles fit into any device's memory");
};

template <class Traits>
class Attend {
  using Element = typename Traits::Element;
  using Chunk = Vector<uint32_t, 4>;

 public:
  ROTEXPORT_DEVICE Attend(const Geometry& geometry, const Rules& rules, const Views<Element>& views)
      : g_(geometry),
        rules_(rules),
        views_(views),
        tokens_(geometry, views, cache_head()),
        query_(0),
        key_(Traits::kTileBytes),
        value_(2 * Traits::kTileBytes) {}

  ROTEXPORT_DEVICE void run() {
    const int first_token = first_row() / g_.repeat;
    if (first_token < tokens_.row.fresh) {
      attend(first_token);
    } else if (g_.splits == 1) {
      store_rows([](int, int) { return Chunk{}; });
    }
  }

 private:
  enum Part : int { kSinks, kSlots, kFresh };

  // A tile of keys: its first position, or slot, and which of its slots hold a token.
  struct Tile {
    int index;
    Part part;
    int first;
    uint32_t held[2];
  };

  ROTEXPORT_DEVICE void attend(int first_token) {
    const int last_token = (first_row() + kTile - 1) / g_.repeat;
    const Row row = tokens_.row;
    first_query_ = row.past + first_token;
    last_query_ = row.past + (last_token < row.fresh ? last_token : row.fresh - 1);
    prepare();
    const int each = tiles_of(count_tiles(), g_.splits);
    const int end = (split() + 1) * each < count_tiles() ? (split() + 1) * each : count_tiles();
    Tile tile = seen_from(split() * each, end);
    if (tile.index < end) {
      load_queries(tile.part);
      load_keys(tile);
      device::copy_async_commit();
    }
    while (tile.index < end) {
      device::copy_async_wait<0>();
      device::barrier();  // the keys are there, the last tile's values are no longer needed
      load_values(tile);
      device::copy_async_commit();
      multiply_keys();
      device::copy_async_wait<0>();
      device::barrier();  // the values are there, the keys are no longer needed
      const Tile next = seen_from(tile.index + 1, end);
      if (next.index < end) {
        if (tile.part == kSinks && next.part != kSinks) load_queries(next.part);
        load_keys(next);
        device::copy_async_commit();
      }
      weigh(tile);
      multiply_values();
      if (keeps_logits() && tile.part != kSinks) write_norms(tile);
      tile = next;
    }
    finish();
  }

  ROTEXPORT_DEVICE void prepare() {
    if (lane() < 16) {
      const int row = warp_row() + lane();
      query_.store(note_at(row),
                   facts_of(g_, views_.decay, tokens_.row.past, cache_head(), first_row() + row));
    }
    device::warp_barrier();
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      maximum_[half] = kHidden;
      sum_[half] = 0;
    }
    ROTEXPORT_UNROLL
    for (int i = 0; i < 4 * 2 * Traits::kSteps; ++i) output_[i / 4][i % 4] = 0;
    // Columns that only exist in the padded size must not hold NaN.
    clear(query_, g_.head_size);
    clear(key_, g_.head_size);
    clear(value_, g_.value_size);
  }

  // What is known of a row lies behind it.
  static ROTEXPORT_DEVICE unsigned note_at(int row) { return row * Traits::kStride + Traits::kSize; }

  ROTEXPORT_DEVICE void clear(const device::Shared<Element>& rows, int width) const {
    const int chunks = (Traits::kSize - width) / 8;
    for (int i = thread(); i < kTile * chunks; i += Traits::kThreads) {
      rows.store(i / chunks * Traits::kStride + width + i % chunks * 8, Chunk{});
    }
  }

  // Of the tiles that some query may see: sinks come first, then slots, then new tokens.
  ROTEXPORT_DEVICE int sink_tiles() const {
    return tiles_of(g_.sinks <= last_query_ ? g_.sinks : last_query_ + 1, kTile);
  }
  ROTEXPORT_DEVICE int slot_tiles() const {
    return tokens_.row.past > g_.sinks ? tiles_of(g_.window, kTile) : 0;
  }
  ROTEXPORT_DEVICE int first_fresh() const {
    const int nearest = first_query_ - rules_.context + 1;
    const int first = nearest < tokens_.row.past ? tokens_.row.past : nearest;
    return first < g_.sinks ? g_.sinks : first;
  }
  ROTEXPORT_DEVICE int count_tiles() const {
    const int fresh = last_query_ - first_fresh() + 1;
    return sink_tiles() + slot_tiles() + (fresh > 0 ? tiles_of(fresh, kTile) : 0);
  }
  // The first tile from `index` on that holds a token which some query sees. All warps find the same.
  ROTEXPORT_DEVICE Tile seen_from(int index, int end) const {
    for (; index < end; ++index) {
      if (index < sink_tiles()) return {index, kSinks, index * kTile, {}};
      const int behind = index - sink_tiles();
      if (behind >= slot_tiles()) return {index, kFresh, first_fresh() + (behind - slot_tiles()) * kTile, {}};
      Tile tile = {index, kSlots, behind * kTile, {}};
      bool seen = false;
      ROTEXPORT_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int slot = tile.first + 32 * half + lane();
        const int j = slot < g_.window ? tokens_.held(slot) : kNone;
        tile.held[half] = device::ballot(j != kNone);
        seen |= j != kNone && first_query_ - j < rules_.context;
      }
      if (device::any(seen)) return tile;
    }
    return {end, kFresh, 0, {}};
  }

  ROTEXPORT_DEVICE void load_queries(Part part) const {
    const Element* from = part == kSinks ? views_.query_sink : views_.query;
    const int last_row = (last_query_ - tokens_.row.past + 1) * g_.repeat - 1;
    ROTEXPORT_ROLL
    for (int i = thread(); i < kTile * Traits::kSize / 8; i += Traits::kThreads) {
      const int row = i / (Traits::kSize / 8);
      const int column = i % (Traits::kSize / 8) * 8;
      const int packed = first_row() + row < last_row ? first_row() + row : last_row;
      if (column < g_.head_size) {
        device::copy_async(query_, row * Traits::kStride + column,
                           from + query_row(packed) * g_.head_size + column);
      }
    }
  }

  // Index of a packed row among the rows of queries and outputs.
  ROTEXPORT_DEVICE int64_t query_row(int packed) const {
    const int64_t head = int64_t{cache_head()} * g_.repeat + packed % g_.repeat;
    return head * g_.tokens + packed / g_.repeat;
  }

  ROTEXPORT_DEVICE void load_keys(const Tile& tile) const {
    const Cache& cache = views_.cache;
    load_rows(key_, tile, tile.part == kSinks ? cache.sink_key : cache.window_key, views_.key, g_.head_size);
  }

  // The values of a tile, and its keys' positions: kForever for those that nobody sees.
  ROTEXPORT_DEVICE void load_values(const Tile& tile) const {
    const Cache& cache = views_.cache;
    load_rows(value_, tile, tile.part == kSinks ? cache.sink_value : cache.window_value, views_.value,
              g_.value_size);
    if (thread() >= kTile) return;
    const int at = tile.first + thread();
    int position = at;
    if (tile.part == kSlots) position = at < g_.window ? tokens_.held(at) : kNone;
    if (tile.part == kSinks && at >= g_.sinks) position = kNone;
    value_.store(note_at(thread()), position == kNone ? int{kForever} : position);
  }

  // Rows of no token become zeros; new tokens behind the last query's repeat it. Both are hidden, but must be
  // finite where the others are.
  ROTEXPORT_DEVICE void load_rows(const device::Shared<Element>& to, const Tile& tile, const void* held,
                                  const Element* fresh, int width) const {
    const int past = tokens_.row.past;
    const int slots = tile.part == kSinks ? g_.sink_slots : g_.window;
    const Element* held_rows = static_cast<const Element*>(held) + int64_t{cache_head()} * slots * width;
    const Element* fresh_rows = fresh + int64_t{cache_head()} * g_.tokens * width;
    ROTEXPORT_ROLL
    for (int i = thread(); i < kTile * Traits::kSize / 8; i += Traits::kThreads) {
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
        if (at >= past) {
          rows = fresh_rows;
          at -= past;
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

  // products_ = queries . keys
  ROTEXPORT_DEVICE void multiply_keys() {
    if (!has_rows()) return;
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kKeyTiles * 4; ++i) products_[i / 4][i % 4] = 0;
    ROTEXPORT_UNROLL
    for (int k = 0; k < Traits::kSteps; ++k) {
      uint32_t rows[4];
      const int row = warp_row() + lane() % 16;
      device::load_matrices(rows, query_, row * Traits::kStride + 16 * k + lane() / 16 * 8);
      ROTEXPORT_UNROLL
      for (int n = 0; n < Traits::kKeyTiles; n += 2) {
        uint32_t keys[4];
        const int key = 8 * n + lane() % 8 + lane() / 16 * 8;
        device::load_matrices(keys, key_, key * Traits::kStride + 16 * k + lane() / 8 % 2 * 8);
        const uint32_t pair[2][2] = {{keys[0], keys[1]}, {keys[2], keys[3]}};
        device::multiply_add<Element>(products_[n], rows, pair[0]);
        device::multiply_add<Element>(products_[n + 1], rows, pair[1]);
      }
    }
  }

  // products_ become weights: powers of two against the rows' maxima, to which the output is brought too.
  ROTEXPORT_DEVICE void weigh(const Tile& tile) {
    if (!has_rows()) return;
    const Curve curve(g_);
    const bool plain = !keeps_logits() && !(curve.cap > 0) && shows_all(tile) && !slopes();
    if (!plain) bend(curve, tile);
    if (keeps_logits() && tile.part != kSinks) write_logits(tile);
    const float factor = plain ? curve.factor : 1.0f;
    bool shrinking = false;
    float shrinks[2];
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      float largest = kHidden;
      ROTEXPORT_UNROLL
      for (int i = 0; i < 2 * Traits::kKeyTiles; ++i) {
        largest = larger(largest, products_[i / 2][2 * half + i % 2]);
      }
      largest = larger(maximum_[half], largest_of_quad(largest) * factor);
      const float reference = reference_of(largest);
      shrinks[half] = device::exp2(maximum_[half] - reference);
      shrinking |= largest != maximum_[half];
      maximum_[half] = largest;
      float sum = 0;
      ROTEXPORT_UNROLL
      for (int i = 0; i < 2 * Traits::kKeyTiles; ++i) {
        float& x = products_[i / 2][2 * half + i % 2];
        x = device::exp2(x * factor - reference);
        sum += x;
      }
      sum_[half] = sum_[half] * shrinks[half] + sum;
    }
    if (!device::any(shrinking)) return;
    ROTEXPORT_UNROLL
    for (int i = 0; i < 4 * 2 * Traits::kSteps; ++i) output_[i / 4][i % 4] *= shrinks[i % 4 / 2];
  }

  // Whether the logits of some row of the warp decay.
  ROTEXPORT_DEVICE bool slopes() const {
    const int row = warp_row() + lane() % 16;
    return device::any(query_.template load<RowFacts>(note_at(row)).slope != 0);
  }

  // Whether all queries see all keys of a tile; of slots it is not known.
  ROTEXPORT_DEVICE bool shows_all(const Tile& tile) const {
    const int last = tile.first + kTile - 1;
    if (tile.part == kSinks) return last < g_.sinks && last <= first_query_;
    return tile.part == kFresh && last <= first_query_ && last_query_ - tile.first < rules_.context;
  }

  // Products become logits, hidden ones -infinity.
  ROTEXPORT_DEVICE void bend(const Curve& curve, const Tile& tile) {
    const bool sinks = tile.part == kSinks;
    const int reach = sinks ? int{kForever} : rules_.context;
    RowFacts facts[2];
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      facts[half] = query_.template load<RowFacts>(note_at(warp_row() + 8 * half + lane() / 4));
      if (sinks) facts[half].slope = 0;
    }
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2 * Traits::kKeyTiles; ++i) {
      const int position = value_.template load<int>(note_at(i / 2 * 8 + lane() % 4 * 2 + i % 2));
      ROTEXPORT_UNROLL
      for (int half = 0; half < 2; ++half) {
        float& x = products_[i / 2][2 * half + i % 2];
        const int distance = facts[half].position - position;
        const bool seen = distance >= 0 && distance < reach;
        x = seen ? curve(x) - facts[half].slope * static_cast<float>(distance) : kHidden;
      }
    }
  }

  // Where slots and new tokens have their numbers: the first of a tile.
  ROTEXPORT_DEVICE int column(const Tile& tile) const {
    return tile.part == kSlots ? tile.first : g_.window + tile.first - tokens_.row.past;
  }

  // Keeps the logits of real queries.
  ROTEXPORT_DEVICE void write_logits(const Tile& tile) const {
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row() + 8 * half + lane() / 4;
      if (!is_real(row)) continue;
      const auto logits = row_of(views_.scratch.logits, row, g_.window + g_.tokens).from(column(tile));
      ROTEXPORT_UNROLL
      for (int i = 0; i < 2 * Traits::kKeyTiles; ++i) {
        const int key = i / 2 * 8 + lane() % 4 * 2 + i % 2;
        const bool exists = value_.template load<int>(note_at(key)) <= last_query_;
        if (exists) logits.store(key, products_[i / 2][2 * half + i % 2]);
      }
    }
  }

  // Of the tile's values: eight lanes take one.
  ROTEXPORT_DEVICE void write_norms(const Tile& tile) const {
    const auto norms = device::Global<float>(views_.scratch.norm)
                           .from(int64_t{cache_head()} * (g_.window + g_.tokens) + column(tile));
    ROTEXPORT_ROLL
    for (int i = thread() / 8; i < kTile; i += Traits::kThreads / 8) {
      const bool exists = value_.template load<int>(note_at(i)) <= last_query_;
      float sum = 0;
      ROTEXPORT_UNROLL
      for (int channel = thread() % 8 * 8; channel < Traits::kSize; channel += 64) {
        sum += sum_of_squares<Element>(value_.template load<Chunk>(i * Traits::kStride + channel));
      }
      sum = sum_of_eight(sum);
      if (exists && thread() % 8 == 0) norms.store(i, sqrtf(sum));
    }
  }

  // output_ += weights . values
  ROTEXPORT_DEVICE void multiply_values() {
    if (!has_rows()) return;
    ROTEXPORT_UNROLL
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t weights[4];
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float (&pair)[4] = products_[2 * k + i / 2];
        weights[i] = device::pack<Element>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
      ROTEXPORT_UNROLL
      for (int n = 0; n < Traits::kSteps; ++n) {
        uint32_t values[4];
        device::load_matrices_transposed(values, value_,
                                         (16 * k + lane() % 16) * Traits::kStride + 16 * n + lane() / 16 * 8);
        const uint32_t pair[2][2] = {{values[0], values[1]}, {values[2], values[3]}};
        device::multiply_add<Element>(output_[2 * n], weights, pair[0]);
        device::multiply_add<Element>(output_[2 * n + 1], weights, pair[1]);
      }
    }
  }

  ROTEXPORT_DEVICE void finish() {
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) sum_[half] = sum_of_quad(sum_[half]);
    g_.splits == 1 ? store_output() : store_part();
  }

  // Divides by the sums and stores, through the warp's own rows of the query buffer.
  ROTEXPORT_DEVICE void store_output() {
    device::barrier();  // queries are no longer needed
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float inverse = 1.0f / sum_[half];
      const int row = warp_row() + 8 * half + lane() / 4;
      ROTEXPORT_UNROLL
      for (int n = 0; n < 2 * Traits::kSteps; ++n) {
        query_.store(
            row * Traits::kStride + 8 * n + lane() % 4 * 2,
            device::pack<Element>(output_[n][2 * half] * inverse, output_[n][2 * half + 1] * inverse));
      }
      const Vector<float, 2> stats = {{maximum_[half], sum_[half]}};
      if (lane() % 4 == 0 && is_real(row)) row_of(views_.scratch.stats, row, 2).store(0, stats);
    }
    device::warp_barrier();
    store_rows(
        [this](int row, int column) { return query_.template load<Chunk>(row * Traits::kStride + column); });
  }

  // Writes the warp's rows: value(row, column) for real tokens, zeros for padding.
  template <class Value>
  ROTEXPORT_DEVICE void store_rows(const Value& value) const {
    const device::Global<Element> output(views_.output);
    for (int i = lane(); i < 16 * (Traits::kSize / 8); i += 32) {
      const int row = warp_row() + i / (Traits::kSize / 8);
      const int column = i % (Traits::kSize / 8) * 8;
      const int packed = first_row() + row;
      if (packed >= g_.tokens * g_.repeat || column >= g_.value_size) continue;
      output.from(query_row(packed) * g_.value_size)
          .store(column, is_real(row) ? value(row, column) : Chunk{});
    }
  }

  // Leaves sums, maxima and what to divide by for the launch that combines all parts.
  ROTEXPORT_DEVICE void store_part() const {
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row() + 8 * half + lane() / 4;
      if (!is_real(row)) continue;
      const auto sums =
          row_of(views_.scratch.sums, row, g_.splits * g_.value_size).from(split() * g_.value_size);
      ROTEXPORT_UNROLL
      for (int n = 0; n < 2 * Traits::kSteps; ++n) {
        const int column = 8 * n + lane() % 4 * 2;
        const Vector<float, 2> pair = {{output_[n][2 * half], output_[n][2 * half + 1]}};
        if (column < g_.value_size) sums.store(column, pair);
      }
      const Vector<float, 2> weights = {{maximum_[half], sum_[half]}};
      if (lane() % 4 == 0) row_of(views_.scratch.weights, row, 2 * g_.splits).store(2 * split(), weights);
    }
  }

  // Numbers of a row of this block, of which every packed row of every key head has `count`.
  ROTEXPORT_DEVICE device::Global<float> row_of(float* numbers, int row, int count) const {
    const int64_t packed = int64_t{cache_head()} * g_.tokens * g_.repeat + first_row() + row;
    return device::Global<float>(numbers).from(packed * count);
  }

  ROTEXPORT_DEVICE bool keeps_logits() const { return views_.scratch.logits != nullptr; }

  // Whether a row of this block is one of a token, and whether this warp has one.
  ROTEXPORT_DEVICE bool is_real(int row) const { return first_row() + row < tokens_.row.fresh * g_.repeat; }
  ROTEXPORT_DEVICE bool has_rows() const { return is_real(warp_row()); }

  // What the block works on, found again rather than kept: sums need every register.
  static ROTEXPORT_DEVICE int block() { return static_cast<int>(device::opaque(device::block_index())); }
  ROTEXPORT_DEVICE int split() const { return block() % g_.splits; }
  ROTEXPORT_DEVICE int first_row() const { return block() / g_.splits % g_.row_tiles * kTile; }
  ROTEXPORT_DEVICE int cache_head() const { return block() / g_.splits / g_.row_tiles; }

  static ROTEXPORT_DEVICE int thread() { return static_cast<int>(device::thread_index()); }
  static ROTEXPORT_DEVICE int lane() { return thread() % 32; }
  static ROTEXPORT_DEVICE int warp_row() { return thread() / 32 * 16; }

  const Geometry& g_;
  const Rules& rules_;
  const Views<Element>& views_;
  Tokens tokens_;
  device::Shared<Element> query_;
  device::Shared<Element> key_;
  device::Shared<Element> value_;
  int first_query_;
  int last_query_;
  float maximum_[2];
  float sum_[2];
  float products_[Traits::kKeyTiles][4];
  float output_[2 * Traits::kSteps][4];
};

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads, 1)
    attend(Geometry geometry, Rules rules, Views<typename Traits::Element> views) {
  Attend<Traits>(geometry, rules, views).run();
}

}  // namespace eviction
