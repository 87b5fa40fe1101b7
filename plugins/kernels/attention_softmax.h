// The online softmax of the query rows whose products a lane holds: shared by all kernels that prefill.
#pragma once

#include "kernels/attention_keys.h"

namespace sink_window_attention {

// A tile of keys as the softmax meets it.
struct TileMask {
  Range range;
  int first;    // position of the tile's first key
  bool whole;   // every query of the block sees all of the tile
  bool slopes;  // some query's logits decay with distance
};

// Rows kRows of which a lane holds columns 8 n + 2 (lane % 4) and the next, for n below kKeys / 8.
template <int kRows, int kKeys>
class Softmax {
 public:
  ROTEXPORT_DEVICE void start() {
    ROTEXPORT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      maximum_[i] = kHidden;
      sum_[i] = 0;
    }
  }

  // Products become weights: powers of two against the rows' maxima. Returns whether a maximum of the warp
  // grew: what row i has summed so far is then to be multiplied by shrinks[i]. product(i, c) is that of row i
  // and of the lane's column c of the tile, facts(i) are those of row i.
  template <class Product, class Facts>
  ROTEXPORT_DEVICE bool weigh(const Geometry& g, const TileMask& mask, const Product& product,
                              const Facts& facts, float (&shrinks)[kRows]) {
    const Curve curve(g);
    const bool plain = mask.whole && !mask.slopes && !(curve.cap > 0);
    bool shrinking = false;
    ROTEXPORT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (!plain) bend(i, curve, mask, product, facts(i));
      const float factor = plain ? curve.factor : 1.0f;
      float largest = kHidden;
      for_each(i, product, [&](float& x, int) { largest = larger(largest, x); });
      largest = larger(maximum_[i], largest_of_quad(largest) * factor);
      const float reference = reference_of(largest);
      shrinks[i] = device::exp2(maximum_[i] - reference);
      shrinking |= largest != maximum_[i];
      maximum_[i] = largest;
      float sum = 0;
      for_each(i, product, [&](float& x, int) {
        x = device::exp2(x * factor - reference);
        sum += x;
      });
      sum_[i] = sum_[i] * shrinks[i] + sum;
    }
    return device::any(shrinking);
  }

  // What turns the summed values of row i into its output.
  ROTEXPORT_DEVICE float inverse_sum(int i) const { return 1.0f / sum_of_quad(sum_[i]); }

 private:
  // Products of a row become logits, hidden ones -infinity.
  template <class Product>
  static ROTEXPORT_DEVICE void bend(int i, const Curve& curve, const TileMask& mask, const Product& product,
                                    const RowFacts& facts) {
    const int first_key = mask.first + static_cast<int>(device::thread_index()) % 4 * 2;
    const float slope = mask.slopes ? facts.slope : 0.0f;
    const float nearest = slope * static_cast<float>(first_key - facts.position);
    for_each(i, product, [&](float& x, int key) {
      x = curve(x) + nearest + slope * static_cast<float>(key);
      if (!mask.range.shows(facts.position, first_key + key)) x = kHidden;
    });
  }

  // Calls visit(product, key - first key of this lane) for row i.
  template <class Product, class Visit>
  static ROTEXPORT_DEVICE void for_each(int i, const Product& product, const Visit& visit) {
    ROTEXPORT_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) {
      visit(product(i, 2 * n), 8 * n);
      visit(product(i, 2 * n + 1), 8 * n + 1);
    }
  }

  float maximum_[kRows];
  float sum_[kRows];
};

}  // namespace sink_window_attention
