// Sizes of tiles, which the planner and the kernels must agree on.
#pragma once

#include "kernels/attention.h"

namespace sink_window_attention {

constexpr int bits_of(Format format) {
  return format == Format::kFloat ? 16 : format == Format::kInt8 ? 8 : format == Format::kInt4 ? 4 : 2;
}

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
  return format == Format::kFloat ? 16 : format == Format::kInt8 ? 32 : 64;
}

// Bytes from one key to the next in shared memory: spreads keys over the banks.
constexpr int key_stride(int size, Format format) { return size * bits_of(format) / 8 + 16; }

// Bytes of a tile of keys, values and their scales.
constexpr int tile_bytes(int size, Format format, int groups) {
  return tile_keys(format) * (2 * key_stride(size, format) + 4 * groups);
}

// How many of a call's tokens a ring of `slots` takes, at most.
constexpr int ring_items(int tokens, int slots) { return tokens < slots ? tokens : slots; }

}  // namespace sink_window_attention
