// What the mean adds to the products of a few queries with centered keys: one product of two matrices for
// each row of the batch, since all heads share the angles. Decoding adds it in registers.
#pragma once

#include "kernels/attention_codes.h"
#include "kernels/attention_keys.h"

namespace sink_window_attention {

constexpr int kMeanWarps = 4;
constexpr int kMostAngles = 256;

template <class Element>
struct MeanOperands {
  const Element* query;   // [batch, query_heads, tokens, angles]
  const Element* angles;  // [batch, window + tokens, angles]
  const int32_t* past_length;
  const int32_t* new_length;
  float* products;  // [batch, kv_heads, packed rows (see attention_query_block.h), mean_row(g)]
};

template <class Element>
class Means {
  using Chunk = Vector<uint32_t, 4>;
  static constexpr int kUnits = kMostAngles / 32;  // eight angles in each of a quad's lanes

 public:
  ROTEXPORT_DEVICE Means(const Geometry& geometry, const MeanOperands<Element>& operands)
      : g_(geometry), operands_(operands) {}

  // A warp keeps the angles of kMeanKeys positions, so that they are read once.
  ROTEXPORT_DEVICE void run() const {
    const int number = static_cast<int>(device::block_index() * kMeanWarps + device::thread_index() / 32);
    const int batch = number / mean_tiles(g_);
    if (batch >= g_.batch) return;
    const int first_key = number % mean_tiles(g_) * kMeanKeys;
    const int past = load_row(operands_.past_length, operands_.new_length, batch, g_.tokens).past;
    const Places places = ring_places(past, g_.sinks, g_.window);
    uint32_t keys[kUnits][2][4];
    ROTEXPORT_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int key = first_key + 8 * n + lane() / 4;
      const int64_t row = int64_t{batch} * (g_.window + g_.tokens) + place_of(key, past, places);
      ROTEXPORT_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        const Chunk words = load(operands_.angles + row * g_.angles, u);
        ROTEXPORT_UNROLL
        for (int i = 0; i < 4; ++i) keys[u][n][i] = words.values[i];
      }
    }
    const int rows = g_.query_heads * g_.tokens;
    for (int first = 0; first < rows; first += 16) multiply(batch, first, rows, first_key, keys);
  }

 private:
  // Where the angles of the key `key` positions after past - window are; anywhere if there is none.
  ROTEXPORT_DEVICE int place_of(int key, int past, const Places& places) const {
    if (key >= g_.window) return key < g_.window + g_.tokens ? key : g_.window;
    const int position = past - g_.window + key;
    return position < g_.sinks ? 0 : places.slot(position);
  }

  // Index of the query of a row: rows are packed token by token within a key head.
  ROTEXPORT_DEVICE int query_of(int row) const {
    const int packed = g_.tokens * g_.repeat;
    const int head = row / packed * g_.repeat + row % g_.repeat;
    return head * g_.tokens + row % packed / g_.repeat;
  }

  ROTEXPORT_DEVICE void multiply(int batch, int first, int rows, int first_key,
                                 const uint32_t (&keys)[kUnits][2][4]) const {
    float products[2][4] = {};
    const int64_t start = int64_t{batch} * rows;
    const Element* queries[2];
    ROTEXPORT_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = first + 8 * r + lane() / 4;
      queries[r] = operands_.query + (start + query_of(row < rows ? row : rows - 1)) * g_.angles;
    }
    ROTEXPORT_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      if (32 * u >= g_.angles) continue;
      const Chunk words[2] = {load(queries[0], u), load(queries[1], u)};
      ROTEXPORT_UNROLL
      for (int step = 0; step < 2; ++step) {
        const uint32_t query[4] = {words[0].values[2 * step], words[1].values[2 * step],
                                   words[0].values[2 * step + 1], words[1].values[2 * step + 1]};
        ROTEXPORT_UNROLL
        for (int n = 0; n < 2; ++n) {
          const uint32_t pair[2] = {keys[u][n][2 * step], keys[u][n][2 * step + 1]};
          device::multiply_add<Element>(products[n], query, pair);
        }
      }
    }
    ROTEXPORT_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = first + 8 * r + lane() / 4;
      if (row >= rows) continue;
      const auto to =
          device::Global<float>(operands_.products).from((start + row) * mean_row(g_) + first_key);
      ROTEXPORT_UNROLL
      for (int n = 0; n < 2; ++n) {
        to.store(8 * n + lane() % 4 * 2, Vector<float, 2>{{products[n][2 * r], products[n][2 * r + 1]}});
      }
    }
  }

  // The lane's eight angles of a unit.
  ROTEXPORT_DEVICE Chunk load(const Element* row, int unit) const {
    const int angle = 32 * unit + lane() % 4 * 8;
    if (angle >= g_.angles) return Chunk{};
    if (g_.angles % 8 != 0) return load_loose(row, angle, g_.angles);
    return device::Global<const Element>(row).template load<Chunk>(angle);
  }

  static ROTEXPORT_DEVICE int lane() { return static_cast<int>(device::thread_index() % 32); }

  const Geometry& g_;
  const MeanOperands<Element>& operands_;
};

template <class Element>
ROTEXPORT_KERNEL void __launch_bounds__(32 * kMeanWarps)
    multiply_means(Geometry geometry, MeanOperands<Element> operands) {
  Means<Element>(geometry, operands).run();
}

}  // namespace sink_window_attention
