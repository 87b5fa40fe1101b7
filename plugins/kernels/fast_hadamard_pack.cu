// Packs the signs of matrices that are too large for a warp's registers.

#include "kernels/fast_hadamard_launch.h"
#include "kernels/fast_hadamard_matrix.h"

namespace fast_hadamard {
namespace {

// Packs the signs of a wide matrix. Word (row tile, k, lane) holds the fragments of the tiles 4k ... 4k + 3
// of that row of tiles: bit 4 t + r is the sign of the first, bit 16 + 4 t + r of the second element of
// register r of tile t.
ROTEXPORT_KERNEL void pack_signs(Geometry geometry, device::Global<const int8_t> base,
                                 device::Global<uint32_t> packed, int words_per_row_tile, int words) {
  const int index = static_cast<int>(device::block_index() * device::block_size() + device::thread_index());
  if (index >= words) return;
  const int lane = index % 32;
  const int quad = index / 32 % words_per_row_tile;
  const int row_tile = index / 32 / words_per_row_tile;
  uint32_t word = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const int tile = bit % 16 / 4;
    const int reg = bit % 4;
    const int row = 16 * row_tile + lane / 4 + 8 * (reg & 1);
    const int column = 16 * (4 * quad + tile) + lane % 4 * 4 + 2 * (reg >> 1) + bit / 16;
    if (matrix_entry(geometry, base, row, column) < 0) word |= 1u << bit;
  }
  packed.store(index, word);
}

}  // namespace

Status pack_matrix(const Plan& plan, const Operands& operands, void* opaque_stream) {
  const auto stream = static_cast<device::Stream>(opaque_stream);
  constexpr unsigned kThreads = 128;
  const auto words = static_cast<unsigned>(plan.workspace_bytes / sizeof(uint32_t));
  const int row_tiles = (plan.geometry.order + 15) / 16;
  return device::launch(pack_signs, {(words + kThreads - 1) / kThreads, kThreads, 0}, stream, plan.geometry,
                        device::Global<const int8_t>(operands.base),
                        device::Global<uint32_t>(static_cast<uint32_t*>(operands.workspace)),
                        (row_tiles + 3) / 4, static_cast<int>(words));
}

}  // namespace fast_hadamard
