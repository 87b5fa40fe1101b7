// Block-wise fast Hadamard transform, alone or with per-token quantization fused.
//
//   y = (x * signs) . blockdiag(H, H, ...) / sqrt(n)      H = base (x) Sylvester, n = base_order *
//   sylvester_order
//
// along the last axis of length `row`, a multiple of n. With output kInt8 or kInt4 each row is then divided
// by
//
//   scale = max(max|y| * (clip / q), 2^-126)              q = 127 or 7
//
// rounded to nearest even and saturated to [-q - 1, q]; int4 is packed two to a byte, the even element in the
// low nibble. Entries of `signs` and `base` are +1 or -1 (only their signs are read). x and y must not
// overlap.
//
// Error. Entries of x reach the products unrounded (float32 as three bfloat16 pieces), products with +-1 are
// exact, and everything is added in float32. With u = 2^-24 and c the order of the matrix that the tensor
// cores apply (16 for base orders up to 8, else the base order), each value before its last rounding is
// within
//
//   (2 c + log2(n) + 4) u * sum_j |x_j| / sqrt(n)
//
// of the exact one, the 2 because tensor cores truncate while they add. y then has one rounding to its type;
// q is the exact quotient's rounding except where the quotient is within this error of a tie, where it is off
// by one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/status.h"

namespace fast_hadamard {

enum class Type : int { kHalf, kBFloat16, kFloat };
enum class Output : int { kSame, kInt8, kInt4 };

constexpr int kLongest = 32768;
constexpr int kMaxWarps = 12;      // of a thread block: 168 registers remain to a thread
constexpr int kMaxLongWarps = 16;  // with two column tiles: 128 registers, so x is loaded in smaller parts

struct Problem {
  Type type;
  Output output;
  int64_t rows;
  int64_t row;
  int64_t base_order;
  int64_t sylvester_order;  // a power of two
  float clip = 1.0f;        // only read when quantizing
};

struct Operands {
  const void* x;
  const void* signs;
  const int8_t* base;
  void* y;
  float* scale;     // only written when quantizing
  void* workspace;  // Plan::workspace_bytes
};

// How the kernel sees a block of n elements: a matrix of `order` rows and `columns` columns, row-major. The
// tensor cores multiply it by an order x order matrix of signs from the left, butterflies transform its rows.
struct Geometry {
  int64_t elements;  // of x
  int row;
  int block;          // order * columns
  int order;          // a multiple of 4
  int base_order;     // the matrix is base (x) Sylvester, repeated along the diagonal
  int repeat_mask;    // selects the bits of a row's index within one repetition: all, unless n < 4
  int log_sylvester;  // of the Sylvester factor of the matrix
  int log_columns;
  int stages;      // of the butterflies; log_columns unless n = 1
  int row_groups;  // of kRowTiles * 16 rows
  int group_step;  // distance of two tiles' blocks: block * (blocks in one tile)
  unsigned units;
  int unit;       // elements that a thread block finishes before it takes others
  int tokens;     // rows of x in a unit, when quantizing
  int tiles;      // warp tiles of a unit
  int rounds;     // passes of the thread block's warps over the tiles
  float scale;    // 1 / sqrt(n)
  float quantum;  // clip / 127 or clip / 7
};

// Which instantiation runs: see Traits in fast_hadamard_tile.h.
struct Variant {
  int column_class;
  int row_tiles;
  int column_tiles;
  int exchange;
};

struct Plan {
  Problem problem;
  Geometry geometry;
  Variant variant;
  unsigned threads;
  unsigned peak_bytes;
  unsigned shared_bytes;
  size_t workspace_bytes;
};

// Chooses how to run a problem. The message of a failure names the offending size.
Status make_plan(const Problem& problem, Plan& plan);

// Runs a plan; `stream` is a cudaStream_t. Operands are aligned to 16 bytes.
Status run(const Plan& plan, const Operands& operands, void* stream);

}  // namespace fast_hadamard
