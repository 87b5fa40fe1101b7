// Sizes of tiles, which the planner and the kernels must agree on.
#pragma once

#include "kernels/attention.h"

namespace sink_window_attention {

constexpr int bits_of(Format format) {
  if (format == Format::kFloat) return 16;
  if (format == Format::kInt8 || format == Format::kFp8) return 8;
  return format == Format::kInt4 ? 4 : 2;
}

// Whether codes are levels above a minimum, in place of numbers.
constexpr bool has_levels(Format format) { return format != Format::kFloat && format != Format::kFp8; }

// Bytes of what a cache of codes keeps of a group: a scale, and a minimum where it has one.
constexpr int scale_bytes(Format format) { return has_levels(format) ? 4 : 2; }

// Prefill: 16 rows in each of a warp's tiles; larger heads leave registers for one.
constexpr int kPrefillWarps = 4;
constexpr int prefill_row_tiles(int size) { return size <= 128 ? 2 : 1; }
constexpr int prefill_rows(int size) { return 16 * prefill_row_tiles(size) * kPrefillWarps; }

// Prefill on warpgroups takes as many rows.
constexpr int kWarpgroupKeys = 128;

constexpr int kDecodeRows = 16;
constexpr int kDecodeStages = 2;
constexpr int decode_warps(int size) { return size <= 128 ? 4 : 2; }
// Bytes of a warp's queries in shared memory; 0 where registers hold them.
constexpr int query_bytes(int size) { return size <= 128 ? 0 : kDecodeRows * size * 2; }
constexpr int tile_keys(Format format) {
  return format == Format::kFloat ? 16 : bits_of(format) == 8 ? 32 : 64;
}

// Bytes from one key to the next in shared memory: spreads keys over the banks.
constexpr int key_stride(int size, Format format) { return size * bits_of(format) / 8 + 16; }

// Bytes of a tile of keys, values and their scales.
constexpr int tile_bytes(int size, Format format, int groups) {
  return tile_keys(format) * (2 * key_stride(size, format) + 4 * groups);
}

// Decoding from centered keys: a row of products with mean keys is in the order of positions, from `window`
// before the call on. Behind it is room for what a slice of keys takes beyond the last one.
constexpr int kMeanKeys = 16;
constexpr int mean_tiles(const Geometry& g) { return (g.window + g.tokens + 2 * kMeanKeys - 2) / kMeanKeys; }
constexpr int mean_row(const Geometry& g) { return mean_tiles(g) * kMeanKeys; }

// Whether attention reads queries and keys from the workspace, and how many channels they have there.
constexpr bool extends_rows(const Plan& plan) { return plan.problem.angles > 0 && !plan.decodes; }
constexpr bool arranges_rows(const Plan& plan) { return plan.problem.rotated != 0 || extends_rows(plan); }
constexpr int arranged_width(const Plan& plan) {
  return extends_rows(plan) ? plan.geometry.key_row : plan.geometry.head_size;
}

// How many of a call's tokens a ring of `slots` takes, at most.
constexpr int ring_items(int tokens, int slots) { return tokens < slots ? tokens : slots; }

}  // namespace sink_window_attention
