// The online softmax of the query rows whose products a lane holds: shared by all kernels on tiles of keys.
#pragma once

#include "kernels/attention_queries.h"

namespace attention {

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
  // and of the lane's column c of the tile. Unless logits are `plain` products in the curve's units, all of
  // which are seen, bend(i) turns the products of row i into logits, hidden ones into kHidden.
  template <class Product, class Bend>
  ROTEXPORT_DEVICE bool weigh(const Curve& curve, bool plain, const Product& product, const Bend& bend,
                              float (&shrinks)[kRows]) {
    bool shrinking = false;
    ROTEXPORT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (!plain) bend(i);
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

  // Calls visit(product, key - first key of this lane) for row i.
  template <class Product, class Visit>
  static ROTEXPORT_DEVICE void for_each(int i, const Product& product, const Visit& visit) {
    ROTEXPORT_UNROLL
    for (int n = 0; n < kKeys / 8; ++n) {
      visit(product(i, 2 * n), 8 * n);
      visit(product(i, 2 * n + 1), 8 * n + 1);
    }
  }

  ROTEXPORT_DEVICE float maximum(int i) const { return maximum_[i]; }
  ROTEXPORT_DEVICE float sum(int i) const { return sum_of_quad(sum_[i]); }
  // What turns the summed values of row i into its output.
  ROTEXPORT_DEVICE float inverse_sum(int i) const { return 1.0f / sum(i); }

 private:
  float maximum_[kRows];
  float sum_[kRows];
};

}  // namespace attention
