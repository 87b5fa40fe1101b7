// What a warp that decodes has summed up for its rows, and how the warps of a block merge their sums.
#pragma once

#include "kernels/attention_decode_widen.h"

namespace sink_window_attention {

template <class Traits>
class DecodeSums : protected DecodeWiden<Traits> {
 protected:
  using Tiles = DecodeWiden<Traits>;
  using Tiles::cache_head;
  using Tiles::facts_end;
  using Tiles::first_row;
  using Tiles::g_;
  using Tiles::lane;
  using Tiles::operands_;
  using Tiles::warp;
  using typename Tiles::Element;

  using Tiles::Tiles;

  ROTEXPORT_DEVICE void start() {
    ROTEXPORT_UNROLL
    for (int r = 0; r < 2; ++r) {
      maximum_[r] = kHidden;
      sum_[r] = 0;
    }
    ROTEXPORT_UNROLL
    for (int i = 0; i < Traits::kSize / 8 * 4; ++i) output_[i / 4][i % 4] = 0;
  }

  ROTEXPORT_DEVICE void shrink(int half, float factor) {
    sum_[half] *= factor;
    ROTEXPORT_UNROLL
    for (int n = 0; n < Traits::kSize / 8; ++n) {
      output_[n][2 * half] *= factor;
      output_[n][2 * half + 1] *= factor;
    }
  }

  // Sums over the block's warps, in their order.
  ROTEXPORT_DEVICE void merge() {
    const device::Shared<float> own(Tiles::stage_offset());
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

 private:
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
        (int64_t{cache_head()} * g_.tokens * g_.repeat + first_row() + row) * g_.splits + Tiles::split();
    device::Global<float>(operands_.parts.sums).from(index * g_.value_size).store(column, sums);
    if (column == 0) {
      device::Global<float>(operands_.parts.weights)
          .from(index * 2)
          .store(0, Vector<float, 2>{{maximum, total}});
    }
  }

 protected:
  float maximum_[2];
  float sum_[2];
  float output_[Traits::kSize / 8][4];
};

}  // namespace sink_window_attention
