// The kernel behind fast_hadamard.h: thread blocks walk over units of rows, transform them tile by tile, and
// store them as they are or as codes.
#pragma once

#include "kernels/fast_hadamard_tile.h"

namespace fast_hadamard {

// Stores `kCount` neighbours, multiplied by `factor`. All lanes of the warp call it.
template <class Traits, int kCount>
ROTEXPORT_DEVICE void store_run(const KernelOperands<Traits>& operands, int index, bool exists,
                                const float (&values)[kCount], float factor) {
  if constexpr (Traits::kQuantizes) {
    constexpr int kBits = Traits::kOutput == Output::kInt8 ? 8 : 4;
    constexpr int kLargest = (1 << (kBits - 1)) - 1;
    uint32_t codes[(kCount * kBits + 31) / 32] = {};
    ROTEXPORT_UNROLL
    for (int i = 0; i < kCount; ++i) {
      int code = device::round_to_int(values[i] * factor);
      code = code > kLargest ? kLargest : code < -kLargest - 1 ? -kLargest - 1 : code;
      codes[i * kBits / 32] |= (static_cast<uint32_t>(code) & ((1u << kBits) - 1)) << i * kBits % 32;
    }
    constexpr int kBytes = kCount * kBits / 8;
    if constexpr (kBytes == 0) {
      // The other nibble of the byte is in the lane that holds the next row.
      const uint32_t other = device::shuffle_xor(codes[0], 4);
      const auto byte = static_cast<uint8_t>(codes[0] | other << 4);
      if (exists && index % 2 == 0) operands.y.store(index / 2, byte);
    } else if (exists) {
      const int at = index * kBits / 8;
      if constexpr (kBytes == 1) {
        operands.y.store(at, static_cast<uint8_t>(codes[0]));
      } else if constexpr (kBytes == 2) {
        operands.y.store(at, static_cast<uint16_t>(codes[0]));
      } else {
        constexpr int kVector = kBytes < 16 ? kBytes / 4 : 4;
        ROTEXPORT_UNROLL
        for (int i = 0; i < kBytes / 4; i += kVector) {
          Vector<uint32_t, kVector> piece;
          ROTEXPORT_UNROLL
          for (int j = 0; j < kVector; ++j) piece.values[j] = codes[i + j];
          operands.y.store(at + 4 * i, piece);
        }
      }
    }
  } else if (exists) {
    constexpr int kBytes = kCount * static_cast<int>(sizeof(typename Traits::Element));
    if constexpr (kBytes == 2) {
      const uint32_t packed = device::pack<typename Traits::Element>(values[0] * factor, 0.0f);
      operands.y.store(index, static_cast<uint16_t>(packed));
    } else {
      constexpr int kVector = kBytes < 16 ? kBytes / 4 : 4;
      constexpr int kPerWord = 4 / static_cast<int>(sizeof(typename Traits::Element));
      ROTEXPORT_UNROLL
      for (int i = 0; i < kBytes / 4; i += kVector) {
        Vector<uint32_t, kVector> piece;
        ROTEXPORT_UNROLL
        for (int j = 0; j < kVector; ++j) {
          if constexpr (kPerWord == 1) {
            piece.values[j] = device::float_bits(values[i + j] * factor);
          } else {
            piece.values[j] = device::pack<typename Traits::Element>(values[2 * (i + j)] * factor,
                                                                     values[2 * (i + j) + 1] * factor);
          }
        }
        operands.y.store(index + i * kPerWord, piece);
      }
    }
  }
}

// The largest |sum| of each token of a unit, as the bits of a float: they order as the floats do, NaN last.
// Then what turns the token's sums into codes.
template <class Traits>
class Peaks {
 public:
  ROTEXPORT_DEVICE explicit Peaks(const Geometry& geometry) : peaks_(0), geometry_(geometry) {}

  ROTEXPORT_DEVICE void clear() const {
    for (int i = thread(); i < geometry_.tokens; i += threads()) peaks_.store(i, uint32_t{0});
    device::barrier();
  }

  ROTEXPORT_DEVICE void gather(const Tile<Traits>& tile, const Place& place) const {
    uint32_t peak = 0;
    tile.for_each_run(place, [&](int offset, bool exists, const auto& values) {
      uint32_t largest = 0;
      ROTEXPORT_UNROLL
      for (int i = 0; i < Tile<Traits>::kLongestRun; ++i) {
        const uint32_t magnitude = device::float_bits(values[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
      if (!exists) return;
      if (geometry_.tokens > 1) {
        peaks_.atomic_max(offset / geometry_.row, largest);
      } else {
        peak = largest > peak ? largest : peak;
      }
    });
    if (geometry_.tokens > 1) return;
    ROTEXPORT_UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const uint32_t other = device::shuffle_xor(peak, lanes);
      peak = other > peak ? other : peak;
    }
    if (thread() % 32 == 0) peaks_.atomic_max(0, peak);
  }

  // Turns peaks into scales, which it writes, and into factors, which it keeps.
  ROTEXPORT_DEVICE void finish(const Place& place, const device::Global<float>& scales) const {
    constexpr float kSmallest = 1.17549435e-38f;  // its inverse is still finite
    device::barrier();
    for (int i = thread(); i * geometry_.row < place.unit_count; i += threads()) {
      const float peak = device::bits_float(peaks_.template load<uint32_t>(i)) * geometry_.scale;
      float scale = peak * geometry_.quantum;
      if (scale < kSmallest) scale = kSmallest;
      scales.store(i, scale);
      peaks_.store(i, device::float_bits(geometry_.scale / scale));
    }
    device::barrier();
  }

  ROTEXPORT_DEVICE float factor(int offset, bool exists) const {
    const int token = geometry_.tokens > 1 && exists ? offset / geometry_.row : 0;
    return device::bits_float(peaks_.template load<uint32_t>(token));
  }

 private:
  static ROTEXPORT_DEVICE int thread() { return static_cast<int>(device::thread_index()); }
  static ROTEXPORT_DEVICE int threads() { return static_cast<int>(device::block_size()); }

  device::Shared<uint32_t> peaks_;
  const Geometry& geometry_;
};

// The operands as seen from the start of a unit.
template <class Traits>
ROTEXPORT_DEVICE KernelOperands<Traits> at_unit(const KernelOperands<Traits>& operands, unsigned unit,
                                                const Geometry& geometry) {
  KernelOperands<Traits> here = operands;
  const int64_t start = static_cast<int64_t>(unit) * geometry.unit;
  here.x = operands.x.from(start);
  here.y = operands.y.from(Traits::kOutput == Output::kInt4 ? start / 2 : start);
  if constexpr (Traits::kQuantizes) here.scale = operands.scale.from(start / geometry.row);
  return here;
}

// The tile of the calling warp in a round of a unit. When there are fewer tiles than warps, some lie past the
// end of the unit, where no element exists: a branch around their work would cost the others more than it
// saves.
template <class Traits>
ROTEXPORT_DEVICE Place place_of(const Geometry& geometry, unsigned unit, int round) {
  Place place;
  const int64_t start = static_cast<int64_t>(unit) * geometry.unit;
  const int64_t left = geometry.elements - start;
  place.unit_count = left < geometry.unit ? static_cast<int>(left) : geometry.unit;
  place.unit_row_start = geometry.unit % geometry.row == 0 ? 0 : static_cast<int>(start % geometry.row);
  const int warp = static_cast<int>(device::thread_index() / 32);
  if constexpr (Traits::kExchange > 1) {
    place.first_block = round * geometry.block;
    place.row_group = Traits::kExchange == 16 ? 0 : warp / Traits::kExchange;  // at most 16 warps
    place.first_column = warp % Traits::kExchange * 128;
  } else {
    const int tile = round * static_cast<int>(device::block_size() / 32) + warp;
    place.first_block = tile / geometry.row_groups * geometry.group_step;
    place.row_group = tile % geometry.row_groups;
    place.first_column = 0;
  }
  return place;
}

template <class Traits>
ROTEXPORT_KERNEL void __launch_bounds__(Traits::kMaxThreads, 1)
    fast_hadamard(Geometry geometry, KernelOperands<Traits> operands, unsigned exchange_offset) {
  Tile<Traits> tile(geometry);
  const Peaks<Traits> peaks(geometry);
  if (geometry.order <= 16) tile.load_matrix(operands.base);
  // A unit of several rounds does not fit the registers: it is transformed once for its peaks and once to be
  // stored.
  const bool twice = Traits::kQuantizes && geometry.rounds > 1;
  for (unsigned unit = device::block_index(); unit < geometry.units; unit += device::grid_size()) {
    if constexpr (Traits::kQuantizes) peaks.clear();
    for (int pass = 0; pass < (twice ? 2 * geometry.rounds : geometry.rounds); ++pass) {
      const int round = pass < geometry.rounds ? pass : pass - geometry.rounds;
      {
        const Place place = place_of<Traits>(geometry, unit, round);
        tile.transform(place, at_unit(operands, unit, geometry));
        if constexpr (Traits::kExchange > 1) tile.exchange(place, device::Shared<float>(exchange_offset));
      }
      // Found again rather than kept: the transform needs every register.
      const unsigned same_unit = device::opaque(unit);
      const Place place = place_of<Traits>(geometry, same_unit, device::opaque(round));
      const KernelOperands<Traits> here = at_unit(operands, same_unit, geometry);
      if constexpr (Traits::kQuantizes) {
        if (pass < geometry.rounds) peaks.gather(tile, place);
        if (pass == geometry.rounds - 1) peaks.finish(place, here.scale);
      }
      if (twice && pass < geometry.rounds) continue;
      tile.for_each_run(place, [&](int offset, bool exists, const auto& values) {
        float factor = geometry.scale;
        if constexpr (Traits::kQuantizes) factor = peaks.factor(offset, exists);
        store_run<Traits, Tile<Traits>::kLongestRun>(here, offset, exists, values, factor);
      });
    }
    if constexpr (Traits::kQuantizes) device::barrier();  // before the peaks are cleared for the next unit
  }
}

}  // namespace fast_hadamard
