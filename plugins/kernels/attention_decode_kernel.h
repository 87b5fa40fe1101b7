// Sink/window attention for a few queries at the speed at which the cache can be read.
//
// A thread block takes 16 packed query rows of one key head (see attention_prefill_kernel.h) and one of
// Geometry::splits parts of the tiles of keys that they see. Each warp works alone: it copies its next tile,
// codes as they are, to shared memory while it multiplies the last one, and widens codes in registers. Tensor
// cores sum over channels in any order, as long as queries and keys agree: a lane takes eight neighbouring
// channels of a key, and eight neighbouring columns of the values. The block then merges its warps' sums and
// writes them with their maxima for the launch that combines all parts.
#pragma once

#include "kernels/attention_codes.h"
#include "kernels/attention_keys.h"
#include "kernels/attention_sizes.h"

namespace sink_window_attention {

template <class Element_, Format kFormat_, int kSize_>
struct DecodeTraits {
  using Element = Element_;
  static constexpr Format kFormat = kFormat_;
  static constexpr int kSize = kSize_;
  static constexpr int kWarps = decode_warps(kSize);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kUnits = kSize / 32;    // of channels: eight in each of a quad's lanes
  static constexpr int kColumns = kSize / 64;  // units of value columns: eight in each row of lanes
  static constexpr int kStages = kDecodeStages;
  static constexpr bool kQueriesShared = query_bytes(kSize) > 0;  // the registers are taken by sums

  static_assert(sizeof(Element) == 2, "tensor cores take 16-bit elements");
  static_assert(kSize % 64 == 0 && kSize <= kLargestHead, "heads are padded to whole units");
};

template <class Element>
struct DecodeOperands {
  const Element* query;
  const Element* query_sink;
  const Element* key;
  const Element* value;
  const int32_t* past_length;
  const int32_t* new_length;
  const float* decay;
  const Element* key_mean;  // nullptr: keys are not centered
  const float* means;       // products of queries with the mean keys: see attention_mean_kernel.h
  Cache cache;
  float* sums;     // [rows, splits, value size], not yet divided by
  float* weights;  // [rows, splits, 2]: maximum and sum
};

// The keys of one part, or their values: in the cache's slots and in the call's tensor.
template <class Element>
struct Side {
  const char* slots;
  const char* scales;
  const Element* fresh;
  const Element* mean;  // of fresh keys
  int width;
  int group;
  int groups;
};

template <class Traits>
class Decode {
  using Element = typename Traits::Element;
  using Chunk = Vector<uint32_t, 4>;
  static constexpr int kCodeTile = tile_keys(Traits::kFormat);
  static constexpr bool kCoded = Traits::kFormat != Format::kFloat;

 public:
  ROTEXPORT_DEVICE Decode(const Geometry& geometry, const DecodeOperands<Element>& operands)
      : g_(geometry),
        operands_(operands),
        stages_(stage_offset()),
        queries_(stages_end() + warp() * query_bytes(Traits::kSize)),
        facts_(facts_end() - (warp() + 1) * kFactBytes) {
    row_ = load_row(operands.past_length, operands.new_length, cache_head() / g_.kv_heads, g_.tokens);
  }

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
      device::warp_barrier();
      const Part part = part_of(tile);
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
    merge();
  }

 private:
  ROTEXPORT_DEVICE unsigned stage_offset() const {
    return warp() * Traits::kStages * static_cast<unsigned>(g_.stage_bytes);
  }
  ROTEXPORT_DEVICE unsigned stages_end() const {
    return Traits::kWarps * Traits::kStages * static_cast<unsigned>(g_.stage_bytes);
  }
  static constexpr unsigned kFactBytes = kDecodeRows * sizeof(RowFacts);
  ROTEXPORT_DEVICE unsigned facts_end() const {
    return stages_end() + Traits::kWarps * (query_bytes(Traits::kSize) + kFactBytes);
  }
  static ROTEXPORT_DEVICE int lane() { return static_cast<int>(device::thread_index() % 32); }
  static ROTEXPORT_DEVICE int warp() { return static_cast<int>(device::thread_index() / 32); }

  ROTEXPORT_DEVICE void prepare(int first_token) {
    const int last_token = (first_row() + kDecodeRows - 1) / g_.repeat;
    first_query_ = row_.past + first_token;
    last_query_ = row_.past + (last_token < row_.fresh ? last_token : row_.fresh - 1);
    far_tile_ = tiles_of(range(kSinks), tile_keys(Format::kFloat));
    near_tile_ = far_tile_ + tiles_of(range(kFar), kCodeTile);
    end_tile_ = near_tile_ + tiles_of(range(kNear), tile_keys(Format::kFloat));
    if (lane() < kDecodeRows) {
      facts_.store(lane(), facts_of(g_, operands_.decay, row_.past, cache_head(), first_row() + lane()));
    }
    device::warp_barrier();
    ROTEXPORT_UNROLL
    for (int r = 0; r < 2; ++r) {
      maximum_[r] = kHidden;
      sum_[r] = 0;
    }
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kSize / 8 * 4; ++i) output_[i / 4][i % 4] = 0;
  }

  static ROTEXPORT_DEVICE int tiles_of(const Range& range, int keys) {
    return (range.count() + keys - 1) / keys;
  }
  ROTEXPORT_DEVICE int first_tile(Part part) const {
    return part == kSinks ? 0 : part == kFar ? far_tile_ : near_tile_;
  }
  ROTEXPORT_DEVICE Range range(Part part) const {
    return range_of(part, g_, kCoded, first_query_, last_query_);
  }
  ROTEXPORT_DEVICE Part part_of(int tile) const {
    return tile < far_tile_ ? kSinks : tile < near_tile_ ? kFar : kNear;
  }

  // What the block works on, found again rather than kept: sums need every register.
  static ROTEXPORT_DEVICE int block() { return static_cast<int>(device::opaque(device::block_index())); }
  ROTEXPORT_DEVICE int split() const { return block() % g_.splits; }
  ROTEXPORT_DEVICE int first_row() const { return block() / g_.splits % g_.row_tiles * kDecodeRows; }
  ROTEXPORT_DEVICE int cache_head() const { return block() / g_.splits / g_.row_tiles; }

  ROTEXPORT_DEVICE Side<Element> side(Part part, bool value) const {
    const Cache& c = operands_.cache;
    Side<Element> side;
    side.slots = as_bytes(value ? c.window_value : c.window_key);
    if (part == kSinks) side.slots = as_bytes(value ? c.sink_value : c.sink_key);
    if (part == kNear && kCoded) side.slots = as_bytes(value ? c.recent_value : c.recent_key);
    side.scales = as_bytes(value ? c.window_value_scale : c.window_key_scale);
    side.fresh = value ? operands_.value : operands_.key;
    side.mean = value ? nullptr : operands_.key_mean;
    side.width = value ? g_.value_size : g_.head_size;
    side.group = value ? g_.value_group : g_.key_group;
    side.groups = value ? g_.value_groups : g_.key_groups;
    return side;
  }
  ROTEXPORT_DEVICE int slots_of(Part part) const {
    return part == kSinks ? g_.sink_slots : part == kNear && kCoded ? g_.recent : g_.window;
  }
  static ROTEXPORT_DEVICE const char* as_bytes(const void* tensor) {
    return static_cast<const char*>(tensor);
  }

  ROTEXPORT_DEVICE Places places(Part part) const {
    const int slots = slots_of(part);
    return part == kSinks ? sink_places(row_.past, slots) : ring_places(row_.past, g_.sinks, slots);
  }

  ROTEXPORT_DEVICE void start_copy(int tile, int stage) const {
    const Part part = part_of(tile);
    if (part == kFar) {
      copy_tile<Traits::kFormat>(part, tile, stage);
    } else {
      copy_tile<Format::kFloat>(part, tile, stage);
    }
  }

  // Where a stage holds keys, values and their scales, in bytes.
  template <Format kFormat>
  ROTEXPORT_DEVICE unsigned at(int stage, int what) const {
    constexpr unsigned kRows = tile_keys(kFormat) * key_stride(Traits::kSize, kFormat);
    const unsigned scales = what < 3 ? 0 : tile_keys(kFormat) * g_.key_groups * 4;
    return stage * g_.stage_bytes + (what < 2 ? what : 2) * kRows + scales;
  }
  enum What : int { kKeys, kValues, kKeyScales, kValueScales };

  template <Format kFormat>
  ROTEXPORT_DEVICE void copy_tile(Part part, int tile, int stage) const {
    const Range range = this->range(part);
    const int first = range.first + (tile - first_tile(part)) * tile_keys(kFormat);
    const Places where = places(part);
    ROTEXPORT_ROLL
    for (int value = 0; value < 2; ++value) {
      const Side<Element> from = side(part, value != 0);
      const unsigned to = at<kFormat>(stage, value ? kValues : kKeys);
      copy_rows<kFormat>(from, range, first, where, to);
      if constexpr (kFormat != Format::kFloat) {
        const unsigned scales_to = at<kFormat>(stage, value ? kValueScales : kKeyScales);
        copy_scales(from, range, first, where, scales_to);
        const int behind = range.last - first < kCodeTile ? range.last + 1 : first + kCodeTile;
        ROTEXPORT_ROLL
        for (int j = first < where.past ? where.past : first; j < behind; ++j) {
          quantize_token(from, where.token(j), to + (j - first) * key_stride(Traits::kSize, kFormat),
                         scales_to + (j - first) * from.groups * 4);
        }
      }
    }
  }

  // Starts to copy a tile's keys or values. Rows behind the last become zeros; new tokens are copied in
  // floating point, and left alone where they have to be quantized.
  template <Format kFormat>
  ROTEXPORT_DEVICE void copy_rows(const Side<Element>& from, const Range& range, int first,
                                  const Places& where, unsigned to) const {
    const int bytes = from.width * bits_of(kFormat) / 8;
    const char* held = from.slots + int64_t{cache_head()} * where.slots * bytes;
    const char* added = as_bytes(from.fresh + int64_t{cache_head()} * g_.tokens * from.width);
    if (bytes % 16 == 0) {
      copy_chunks<kFormat, 16>(held, added, bytes, range, first, where, to);
    } else if constexpr (kFormat != Format::kFloat) {
      if (bytes % 8 == 0) {
        copy_chunks<kFormat, 8>(held, added, bytes, range, first, where, to);
      } else {
        copy_chunks<kFormat, 4>(held, added, bytes, range, first, where, to);
      }
    }
  }

  template <Format kFormat, int kBytes>
  ROTEXPORT_DEVICE void copy_chunks(const char* held, const char* added, int bytes, const Range& range,
                                    int first, const Places& where, unsigned to) const {
    constexpr int kChunks = Traits::kSize * bits_of(kFormat) / 8 / 16;
    constexpr int kLanes = kChunks < 32 ? kChunks : 32;  // side by side on one key
    constexpr int kStride = key_stride(Traits::kSize, kFormat);
    const int column = lane() % kLanes * kBytes;
    for (int i = lane() / kLanes; i < tile_keys(kFormat); i += 32 / kLanes) {
      const int j = first + i;
      const bool fresh = where.is_fresh(j);
      if (j <= range.last && fresh && kFormat != Format::kFloat) continue;
      const char* from = fresh ? added + static_cast<int64_t>(where.token(j)) * bytes
                               : held + static_cast<int64_t>(where.slot(j)) * bytes;
      for (int c = column; c < bytes; c += kLanes * kBytes) {
        if (j <= range.last) {
          device::copy_async<kBytes>(stages_, to + i * kStride + c, from + c);
        } else {
          stages_.store(to + i * kStride + c, Vector<uint32_t, kBytes / 4>{});
        }
      }
    }
  }

  ROTEXPORT_DEVICE void copy_scales(const Side<Element>& from, const Range& range, int first,
                                    const Places& where, unsigned to) const {
    const char* held = from.scales + int64_t{cache_head()} * where.slots * from.groups * 4;
    for (int i = lane(); i < kCodeTile * from.groups; i += 32) {
      const int j = first + i / from.groups;
      if (j > range.last) {
        stages_.store(to + 4 * i, uint32_t{0});
      } else if (!where.is_fresh(j)) {
        const int64_t scale = int64_t{where.slot(j)} * from.groups + i % from.groups;
        device::copy_async<4>(stages_, to + 4 * i, held + 4 * scale);
      }
    }
  }

  // A new token, as it will be stored.
  ROTEXPORT_DEVICE void quantize_token(const Side<Element>& from, int token, unsigned to,
                                       unsigned scale_to) const {
    if constexpr (kCoded) {
      float x[kLaneChannels];
      const int64_t index = int64_t{cache_head()} * g_.tokens + token;
      load_centered(x, from.fresh, from.mean, index, lane(), from.width);
      const LaneCodes made = quantize<Element, Traits::kFormat>(x, lane(), from.group);
      const int channel = lane() * kLaneChannels;
      if (channel >= from.width) return;
      store_codes<Traits::kFormat>(stages_, to, made, lane());
      if (channel % from.group == 0) stages_.store(scale_to + channel / from.group * 4, made.scale);
    }
  }

  // Index of one of the block's rows among all queries: rows behind the last one repeat it.
  ROTEXPORT_DEVICE int64_t query_row(int row) const {
    const int last_row = (last_query_ - row_.past + 1) * g_.repeat - 1;
    const int packed = first_row() + row < last_row ? first_row() + row : last_row;
    const int64_t head = int64_t{cache_head()} * g_.repeat + packed % g_.repeat;
    return head * g_.tokens + packed / g_.repeat;
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
    if (format == Format::kInt8) {
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
    if constexpr (kFormat != Format::kFloat) {
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
        if (channel < g_.head_size) widen_key<kFormat>(keys, stage, slice + 8 * n + lane() / 4, channel);
        multiply_step(products_[n], u, 0, keys[0]);
        multiply_step(products_[n], u, 1, keys[1]);
      }
    }
  }

  // Eight channels of a key.
  template <Format kFormat>
  ROTEXPORT_DEVICE void widen_key(uint32_t (&keys)[2][2], int stage, int key, int channel) const {
    using Form = Codes<Element, kFormat>;
    const unsigned from =
        at<kFormat>(stage, kKeys) + key * key_stride(Traits::kSize, kFormat) + channel * Form::kBits / 8;
    if constexpr (kFormat == Format::kFloat) {
      const Chunk words = stages_.template load<Chunk>(from);
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4; ++i) keys[i / 2][i % 2] = words.values[i];
    } else {
      const uint32_t scale =
          stages_.template load<uint32_t>(at<kFormat>(stage, kKeyScales) +
                                          (key * g_.key_groups + (channel * g_.key_group_inverse >> 16)) * 4);
      const uint32_t steps = low_halves(scale, scale);
      const uint32_t minima = high_halves(scale, scale);
      if constexpr (kFormat == Format::kInt8) {
        const auto words = stages_.template load<Vector<uint32_t, 2>>(from);
        Form::widen(keys[0], words.values[0], steps, minima);
        Form::widen(keys[1], words.values[1], steps, minima);
      } else {
        uint32_t word;
        if constexpr (kFormat == Format::kInt4) {
          word = stages_.template load<uint32_t>(from);
        } else {
          word =
              device::pick_bytes(stages_.template load<uint16_t>(from), 0, 0x4140u);  // a byte to each half
        }
        uint32_t pairs[4];
        Form::widen(pairs, word, steps, minima);
        ROTEXPORT_UNROLL
        for (int i = 0; i < 4; ++i) keys[i / 2][i % 2] = pairs[i];
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

  ROTEXPORT_DEVICE void shrink(int half, float factor) {
    sum_[half] *= factor;
    ROTEXPORT_UNROLL
    for (int n = 0; n < Traits::kSize / 8; ++n) {
      output_[n][2 * half] *= factor;
      output_[n][2 * half + 1] *= factor;
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
          widen_values<kFormat>(values[k], stage, slice + 8 * k + lane() % 4 * 2, column);
      }
      ROTEXPORT_UNROLL
      for (int n = 0; n < 8; ++n) {
        const uint32_t pair[2] = {values[0][n], values[1][n]};
        device::multiply_add<Element>(output_[8 * v + n], weights, pair);
      }
    }
  }

  // Eight columns of the values of two neighbouring keys, in pairs.
  template <Format kFormat>
  ROTEXPORT_DEVICE void widen_values(uint32_t (&values)[8], int stage, int key, int column) const {
    using Form = Codes<Element, kFormat>;
    constexpr unsigned kStride = key_stride(Traits::kSize, kFormat);
    constexpr int kWords = Form::kBits / 4 > 0 ? Form::kBits / 4 : 1;
    const unsigned from = at<kFormat>(stage, kValues) + key * kStride + column * Form::kBits / 8;
    uint32_t steps = 0;
    uint32_t minima = 0;
    if constexpr (kFormat != Format::kFloat) {
      const unsigned scales = at<kFormat>(stage, kValueScales) +
                              (key * g_.value_groups + (column * g_.value_group_inverse >> 16)) * 4;
      const auto first = stages_.template load<uint32_t>(scales);
      const auto second = stages_.template load<uint32_t>(scales + 4 * g_.value_groups);
      steps = low_halves(first, second);
      minima = high_halves(first, second);
    }
    if constexpr (kFormat == Format::kInt2) {
      const uint32_t first = stages_.template load<uint16_t>(from);
      const uint32_t second = stages_.template load<uint16_t>(from + kStride);
      Form::widen(values, low_halves(first, second), steps, minima);
    } else {
      using Words = Vector<uint32_t, Form::kBits / 4>;
      const Words first = stages_.template load<Words>(from);
      const Words second = stages_.template load<Words>(from + kStride);
      ROTEXPORT_UNROLL
      for (int i = 0; i < kWords; ++i) {
        uint32_t low[Form::kFields];
        uint32_t high[Form::kFields];
        Form::widen(low, low_halves(first.values[i], second.values[i]), steps, minima);
        Form::widen(high, high_halves(first.values[i], second.values[i]), steps, minima);
        ROTEXPORT_UNROLL
        for (int c = 0; c < Form::kFields; ++c) {
          values[2 * Form::kFields * i + c] = low[c];
          values[2 * Form::kFields * i + Form::kFields + c] = high[c];
        }
      }
    }
  }

  // Sums over the block's warps, in their order.
  ROTEXPORT_DEVICE void merge() {
    const device::Shared<float> own(stage_offset());
    const device::Shared<float> weights(facts_end());
    ROTEXPORT_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = 8 * half + lane() / 4;
      const float sum = sum_of_quad(sum_[half]);
      if (lane() % 4 == 0) {
        weights.store((warp() * kDecodeRows + row) * 2, Vector<float, 2>{{maximum_[half], sum}});
      }
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4 * Traits::kColumns; ++i) {
        const int v = i / 4;
        const int e = i / 2 % 2;
        const int n = 8 * v + i % 2 * 4;
        const int column = 64 * v + 8 * (lane() % 4 * 2 + e) + i % 2 * 4;
        own.store(row * Traits::kSize + column,
                  Vector<float, 4>{{output_[n][2 * half + e], output_[n + 1][2 * half + e],
                                    output_[n + 2][2 * half + e], output_[n + 3][2 * half + e]}});
      }
    }
    device::barrier();
    const int rows = g_.tokens * g_.repeat;
    for (int i = static_cast<int>(device::thread_index()); i < kDecodeRows * Traits::kSize / 4;
         i += Traits::kThreads) {
      const int row = i / (Traits::kSize / 4);
      const int column = i % (Traits::kSize / 4) * 4;
      if (first_row() + row < rows && column < g_.value_size) write_sums(weights, row, column);
    }
  }

  ROTEXPORT_DEVICE void write_sums(const device::Shared<float>& weights, int row, int column) const {
    float maximum = kHidden;
    ROTEXPORT_UNROLL
    for (int w = 0; w < Traits::kWarps; ++w) {
      maximum = larger(maximum, weights.template load<float>((w * kDecodeRows + row) * 2));
    }
    float total = 0;
    Vector<float, 4> sums = {};
    ROTEXPORT_UNROLL
    for (int w = 0; w < Traits::kWarps; ++w) {
      const auto weight = weights.template load<Vector<float, 2>>((w * kDecodeRows + row) * 2);
      const float factor = device::exp2(weight.values[0] - reference_of(maximum));
      total += weight.values[1] * factor;
      const device::Shared<float> part(w * Traits::kStages * static_cast<unsigned>(g_.stage_bytes));
      const auto values = part.template load<Vector<float, 4>>(row * Traits::kSize + column);
      ROTEXPORT_UNROLL
      for (int i = 0; i < 4; ++i) sums.values[i] += values.values[i] * factor;
    }
    const int64_t index =
        (int64_t{cache_head()} * g_.tokens * g_.repeat + first_row() + row) * g_.splits + split();
    device::Global<float>(operands_.sums).from(index * g_.value_size).store(column, sums);
    if (column == 0) {
      device::Global<float>(operands_.weights).from(index * 2).store(0, Vector<float, 2>{{maximum, total}});
    }
  }

  const Geometry& g_;
  const DecodeOperands<Element>& operands_;
  device::Shared<char> stages_;
  device::Shared<uint32_t> queries_;
  device::Shared<RowFacts> facts_;
  Row row_;
  int first_query_;
  int last_query_;
  int far_tile_;  // sinks come before, recent tokens behind
  int near_tile_;
  int end_tile_;
  float maximum_[2];
  float sum_[2];
  uint32_t query_[Traits::kQueriesShared ? 1 : Traits::kUnits][2][4];
  float products_[2][4];
  float output_[Traits::kSize / 8][4];
};

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kThreads, 1)
    decode(Geometry geometry, DecodeOperands<typename Traits::Element> operands) {
  Decode<Traits>(geometry, operands).run();
}

}  // namespace sink_window_attention
