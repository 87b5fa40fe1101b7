// Sizes of tiles, which the planner and the kernels must agree on.
#pragma once

namespace eviction {

constexpr int kTile = 64;     // packed query rows, and keys, that a thread block takes at a time
constexpr int kFewRows = 16;  // packed rows whose logits take less to keep than the keys to read again

constexpr int tiles_of(int count, int size) { return (count + size - 1) / size; }

// Tiles of 16 keys whose mass a warp sums; larger heads leave registers for one.
constexpr int mass_key_tiles(int size) { return size <= 128 ? 2 : 1; }
constexpr int mass_keys(int size) { return kTile * mass_key_tiles(size); }

}  // namespace eviction
