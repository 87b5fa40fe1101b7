// What the call's queries gave each token besides the sinks, from the maxima and sums that attention left,
// and the norm of its value.
//
// A thread block takes mass_keys(size) slots or new tokens of one key head, whose keys its warps hold in
// registers as rows of matrices, and walks over the packed query rows that count and may see them. Products
// become weights again, and each lane adds up those of its keys: nothing is written until the end, and the
// order of sums is fixed.
#pragma once

#include "kernels/attention_tiles.h"
#include "kernels/eviction_tokens.h"

namespace eviction {

// Tiles of rows of matrices are keys here, and the two tiles of keys are stages of queries.
template <class Element, int kSize>
struct MassTraits : TileTraits<Element, kSize, mass_key_tiles(kSize)> {
  using Tiles = TileTraits<Element, kSize, mass_key_tiles(kSize)>;
  static constexpr int kKeyTiles = Tiles::kRowTiles;
  static constexpr int kKeys = Tiles::kRows;
  static constexpr int kWarpKeys = Tiles::kWarpRows;
  static constexpr unsigned kSharedBytes = 2 * Tiles::kTileBytes;

  static_assert(Tiles::kKeys == kTile && kKeys == mass_keys(kSize), "what the planner counts");
  static_assert(kKeys <= 2 * kTile, "keys pass through the stages of queries");
};

template <class Traits>
class Mass {
  using Element = typename Traits::Element;
  using Chunk = Vector<uint32_t, 4>;

 public:
  ROTEXPORT_DEVICE Mass(const Geometry& geometry, const Rules& rules, const Views<Element>& views)
      : g_(geometry),
        rules_(rules),
        views_(views),
        head_(static_cast<int>(device::block_index()) / tiles()),
        tokens_(geometry, views, head_),
        rows_(0) {
    const int tile = static_cast<int>(device::block_index()) % tiles();
    const int slot_tiles = tiles_of(g_.window, Traits::kKeys);
    fresh_ = tile >= slot_tiles;
    first_ = (fresh_ ? tile - slot_tiles : tile) * Traits::kKeys;
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2 * Traits::kKeyTiles; ++i) sums_[i / 2][i % 2] = 0;
  }

  ROTEXPORT_DEVICE void run() {
    if (fresh_ ? first_ >= tokens_.row.fresh : tokens_.row.past <= g_.sinks) return;
    const int begin = first_counting() * g_.repeat;
    const int end = last_seeing() * g_.repeat;
    if (begin < end) copy_keys();  // on their way while norms are summed
    write_norms();
    if (begin < end) {
      hold_keys();
      add_queries(begin, end);
    }
    write_mass();
  }

 private:
  // Of a key head: first of slots, then of new tokens.
  ROTEXPORT_DEVICE int tiles() const {
    return tiles_of(g_.window, Traits::kKeys) + tiles_of(g_.tokens, Traits::kKeys);
  }

  // The first of the call's tokens that counts and may see a key, and the one behind the last.
  ROTEXPORT_DEVICE int first_counting() const {
    const Row row = tokens_.row;
    const int first = fresh_ ? first_ : 0;
    if (rules_.policy == Policy::kHeavyHitter) return first;
    if (row.past > 0) return row.fresh;
    const int observing = row.fresh - rules_.observe;
    return first > observing ? first : observing;
  }
  ROTEXPORT_DEVICE int last_seeing() const {
    const int64_t behind = int64_t{first_} + Traits::kKeys - 1 + rules_.context;
    const int fresh = tokens_.row.fresh;
    return fresh_ && behind < fresh ? static_cast<int>(behind) : fresh;
  }

  // The token that key `key` of the block is: its position, and where it is kept.
  ROTEXPORT_DEVICE int position(int key) const {
    const int at = first_ + key;
    if (fresh_) return tokens_.fresh(at);
    return at < g_.window ? tokens_.held(at) : kNone;
  }
  // Keys past the last slot or token repeat it.
  ROTEXPORT_DEVICE const Element* row(int key, const void* slots, const Element* fresh, int width) const {
    const int count = fresh_ ? g_.tokens : g_.window;
    const int at = first_ + key < count ? first_ + key : count - 1;
    const Element* rows = fresh_ ? fresh : static_cast<const Element*>(slots);
    return rows + (int64_t{head_} * count + at) * width;
  }
  ROTEXPORT_DEVICE int64_t column(int key) const {
    return int64_t{head_} * (g_.window + g_.tokens) + (fresh_ ? g_.window : 0) + first_ + key;
  }

  // Eight lanes take a key. What is no token is read, too, so that loads need not wait for positions.
  ROTEXPORT_DEVICE void write_norms() const {
    ROTEXPORT_UNROLL_BY(4)
    for (int i = lane() / 8; i < Traits::kWarpKeys; i += 4) {
      const int key = warp_key() + i;
      const device::Global<const Element> value(
          row(key, views_.cache.window_value, views_.value, g_.value_size));
      float sum = 0;
      ROTEXPORT_UNROLL
      for (int c = 0; c < Traits::kSize; c += 64) {
        const int channel = c + lane() % 8 * 8;
        if (channel < g_.value_size) sum += sum_of_squares<Element>(value.template load<Chunk>(channel));
      }
      sum = sum_of_eight(sum);
      if (lane() % 8 == 0 && position(key) != kNone) {
        device::Global<float>(views_.scratch.norm).from(column(key)).store(0, sqrtf(sum));
      }
    }
  }

  // Starts to copy the block's keys to the queries' stages.
  ROTEXPORT_DEVICE void copy_keys() const {
    clear_padding<Traits>(rows_, 2 * kTile, g_.head_size);
    ROTEXPORT_ROLL
    for (int i = thread(); i < Traits::kKeys * Traits::kSize / 8; i += Traits::kThreads) {
      const int key = i / (Traits::kSize / 8);
      const int channel = i % (Traits::kSize / 8) * 8;
      if (channel >= g_.head_size) continue;
      device::copy_async(rows_, key * Traits::kStride + channel,
                         row(key, views_.cache.window_key, views_.key, g_.head_size) + channel);
    }
    device::copy_async_commit();
  }

  // Brings them to the registers of their warps.
  ROTEXPORT_DEVICE void hold_keys() {
    device::copy_async_wait<0>();
    device::barrier();
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kKeyTiles * Traits::kSteps; ++i) {
      const int key = warp_key() + i / Traits::kSteps * 16 + lane() % 16;
      const int channel = i % Traits::kSteps * 16 + lane() / 16 * 8;
      device::load_matrices(keys_[i / Traits::kSteps][i % Traits::kSteps], rows_,
                            key * Traits::kStride + channel);
    }
    device::barrier();
  }

  ROTEXPORT_DEVICE void add_queries(int begin, int end) {
    ROTEXPORT_UNROLL
    for (int i = 0; i < 2 * Traits::kKeyTiles; ++i) {
      const int j = position(warp_key() + i / 2 * 16 + i % 2 * 8 + lane() / 4);
      positions_[i / 2][i % 2] = j == kNone ? int{kForever} : j;
    }
    load_queries(begin, end, 0);
    device::copy_async_commit();
    for (int row = begin, stage = 0; row < end; row += kTile, stage ^= 1) {
      if (row + kTile < end) load_queries(row + kTile, end, stage ^ 1);
      device::copy_async_commit();
      device::copy_async_wait<1>();
      device::barrier();
      add_stage(stage);
      device::barrier();
    }
    device::copy_async_wait<0>();
  }

  // Rows behind the last repeat it, and count for nothing.
  ROTEXPORT_DEVICE void load_queries(int first, int end, int stage) const {
    ROTEXPORT_ROLL
    for (int i = thread(); i < kTile * Traits::kSize / 8; i += Traits::kThreads) {
      const int row = i / (Traits::kSize / 8);
      const int channel = i % (Traits::kSize / 8) * 8;
      const int packed = first + row < end ? first + row : end - 1;
      if (channel < g_.head_size) {
        device::copy_async(rows_, (stage * kTile + row) * Traits::kStride + channel,
                           views_.query + query_row(g_, head_, packed) * g_.head_size + channel);
      }
    }
    if (thread() < kTile)
      rows_.store(note_at<Traits>(stage * kTile + thread()), facts_of_row(first + thread(), end));
  }

  ROTEXPORT_DEVICE QueryFacts facts_of_row(int packed, int end) const {
    if (packed >= end) return {kNone, 0, 0, 0};
    return query_facts(g_, rules_, views_, tokens_, head_, packed);
  }

  // Sixteen queries at a time.
  ROTEXPORT_DEVICE void add_stage(int stage) {
    const Curve curve(g_);
    ROTEXPORT_ROLL
    for (int first = stage * kTile; first < (stage + 1) * kTile; first += 16) {
      float products[Traits::kKeyTiles][2][4];
      ROTEXPORT_UNROLL
      for (int i = 0; i < Traits::kKeyTiles * 8; ++i) products[i / 8][i / 4 % 2][i % 4] = 0;
      ROTEXPORT_UNROLL
      for (int k = 0; k < Traits::kSteps; ++k) {
        uint32_t queries[4];
        const int row = first + lane() % 8 + lane() / 16 * 8;
        device::load_matrices(queries, rows_, row * Traits::kStride + 16 * k + lane() / 8 % 2 * 8);
        const uint32_t pair[2][2] = {{queries[0], queries[1]}, {queries[2], queries[3]}};
        ROTEXPORT_UNROLL
        for (int t = 0; t < Traits::kKeyTiles; ++t) {
          device::multiply_add<Element>(products[t][0], keys_[t][k], pair[0]);
          device::multiply_add<Element>(products[t][1], keys_[t][k], pair[1]);
        }
      }
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = first + i / 2 * 8 + lane() % 4 * 2 + i % 2;
        const auto query = rows_.template load<QueryFacts>(note_at<Traits>(row));
        ROTEXPORT_UNROLL
        for (int t = 0; t < 2 * Traits::kKeyTiles; ++t) {
          const int distance = query.position - positions_[t / 2][t % 2];
          const float product = products[t / 2][i / 2][t % 2 * 2 + i % 2];
          const float x = curve(product) - query.slope * static_cast<float>(distance) - query.maximum;
          const bool seen = distance >= 0 && distance < rules_.context;
          sums_[t / 2][t % 2] += seen ? device::exp2(x) * query.count : 0.0f;
        }
      }
    }
  }

  ROTEXPORT_DEVICE void write_mass() const {
    ROTEXPORT_UNROLL
    for (int t = 0; t < 2 * Traits::kKeyTiles; ++t) {
      const int key = warp_key() + t / 2 * 16 + t % 2 * 8 + lane() / 4;
      const float sum = sum_of_quad(sums_[t / 2][t % 2]);
      if (lane() % 4 == 0 && position(key) != kNone) {
        device::Global<float>(views_.scratch.mass).from(column(key)).store(0, sum);
      }
    }
  }

  static ROTEXPORT_DEVICE int thread() { return static_cast<int>(device::thread_index()); }
  static ROTEXPORT_DEVICE int lane() { return thread() % 32; }
  static ROTEXPORT_DEVICE int warp_key() { return thread() / 32 * Traits::kWarpKeys; }

  const Geometry& g_;
  const Rules& rules_;
  const Views<Element>& views_;
  int head_;
  Tokens tokens_;
  device::Shared<Element> rows_;
  bool fresh_;
  int first_;
  uint32_t keys_[Traits::kKeyTiles][Traits::kSteps][4];
  int positions_[Traits::kKeyTiles][2];
  float sums_[Traits::kKeyTiles][2];
};

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads)
    mass(Geometry geometry, Rules rules, Views<typename Traits::Element> views) {
  Mass<Traits>(geometry, rules, views).run();
}

}  // namespace eviction
