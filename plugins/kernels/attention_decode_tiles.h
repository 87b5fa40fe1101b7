// Tiles of keys and values on their way to a warp, for decoding.
//
// The tiles that a block's queries see are numbered through: sinks, then codes, then floating point. A warp
// copies codes as they are, with their scales, quantizes new tokens that codes will hold, and fills what lies
// behind the last key with zeros.
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
struct DecodeOperands : CallViews<Element> {
  const Element* key_mean;  // nullptr: keys are not centered
  const float* means;       // products of queries with the mean keys: see attention_mean_kernel.h
  Cache cache;
  Parts<float> parts;
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
class DecodeTiles {
 protected:
  using Element = typename Traits::Element;
  static constexpr int kCodeTile = tile_keys(Traits::kFormat);
  static constexpr bool kCoded = Traits::kFormat != Format::kFloat;

  ROTEXPORT_DEVICE DecodeTiles(const Geometry& geometry, const DecodeOperands<Element>& operands)
      : g_(geometry),
        operands_(operands),
        stages_(stage_offset()),
        queries_(stages_end() + warp() * query_bytes(Traits::kSize)),
        facts_(facts_end() - (warp() + 1) * kFactBytes) {
    row_ = load_row(operands.past_length, operands.new_length, cache_head() / g_.kv_heads, g_.tokens);
  }

  // Counts the tiles of what queries from token `first_token` on see.
  ROTEXPORT_DEVICE void begin(int first_token) {
    const int last_token = (first_row() + kDecodeRows - 1) / g_.repeat;
    first_query_ = row_.past + first_token;
    last_query_ = row_.past + (last_token < row_.fresh ? last_token : row_.fresh - 1);
    far_tile_ = tiles_of(range(kSinks), tile_keys(Format::kFloat));
    near_tile_ = far_tile_ + tiles_of(range(kFar), kCodeTile);
    end_tile_ = near_tile_ + tiles_of(range(kNear), tile_keys(Format::kFloat));
  }

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
    for (int i = lane(); i < kCodeTile * from.groups; i += 32) {
      const int j = first + i / from.groups;
      if (j > range.last) {
        stages_.store(to + 4 * i, uint32_t{0});
      } else if (!where.is_fresh(j)) {
        copy_scale(from, where.slots, scale_index(from, where, j, i), to + 4 * i);
      }
    }
  }

  ROTEXPORT_DEVICE int64_t scale_index(const Side<Element>& from, const Places& where, int j, int i) const {
    return (int64_t{cache_head()} * where.slots + where.slot(j)) * from.groups + i % from.groups;
  }

  // A step without minimum has half a word, and is copied with the one beside it.
  ROTEXPORT_DEVICE void copy_scale(const Side<Element>& from, int slots, int64_t index, unsigned to) const {
    constexpr int kBytes = scale_bytes(Traits::kFormat);
    const int64_t last = int64_t{g_.batch} * g_.kv_heads * slots * from.groups - 1;
    if (kBytes == 4 || index % 2 != 0 || index < last) {
      device::copy_async<4>(stages_, to, from.scales + (index * kBytes & ~int64_t{3}));
    } else {
      const auto scales = device::Global<const char>(from.scales).from(index * kBytes);
      stages_.store(to, load_scale<Traits::kFormat>(scales, 0));
    }
  }

  // Steps without minimum, from the words with which a tile's scales have come to the lane that copied them.
  ROTEXPORT_DEVICE void pick_scales(int tile, int stage) const {
    if constexpr (kCoded && !has_levels(Traits::kFormat)) {
      const Range range = this->range(kFar);
      const int first = range.first + (tile - first_tile(kFar)) * kCodeTile;
      const Places where = places(kFar);
      ROTEXPORT_ROLL
      for (int value = 0; value < 2; ++value) {
        const Side<Element> from = side(kFar, value != 0);
        const unsigned to = at<Traits::kFormat>(stage, value ? kValueScales : kKeyScales);
        for (int i = lane(); i < kCodeTile * from.groups; i += 32) {
          const int j = first + i / from.groups;
          if (j > range.last || where.is_fresh(j)) continue;
          const auto word = stages_.template load<uint32_t>(to + 4 * i);
          const bool upper = scale_index(from, where, j, i) % 2 != 0;
          stages_.store(to + 4 * i, upper ? word >> 16 : word & 0xffffu);
        }
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

  const Geometry& g_;
  const DecodeOperands<Element>& operands_;
  device::Shared<char> stages_;  // the warp's, as all of shared memory here
  device::Shared<uint32_t> queries_;
  device::Shared<RowFacts> facts_;
  Row row_;
  int first_query_;
  int last_query_;
  int far_tile_;  // sinks come before, recent tokens behind
  int near_tile_;
  int end_tile_;
};

}  // namespace sink_window_attention
