// Products of quantized rows with quantized weights, in integers.
//
//   y[t, n] = sum over groups g of s_x[t, g] s_w[g, n] sum over k in g of x[t, k] w[n, k]  + bias[n]
//
// x and w hold signed 8-bit integers, or 4-bit ones two to a byte, that of even k in the low nibble. Rows of
// w are groups * group long, with zeros beyond the length of x. s_x is one number a row, or one for each
// group. With `two_level` w stands for (w - z) f, of magnitudes up to 127, and its scale is s_w[n]: a byte of
// factors[g, n] holds f, 1 to 15, in its low four bits and z, -8 to 7, in its high four; beyond the length of
// x w is z. With `asymmetric` x stands for x - zero[t], and s_x[t] zero[t] weight_sum[n] is subtracted,
// weight_sum[n] being the sum over k of w times its scale. The ending adds a residual to y, or multiplies it
// with silu(gate).
//
// Error. Sums of a group are exact int32. With one scale for a column, or two-level ones, that holds for the
// whole sum, however the work is split. A group's sum is then rounded to float32 and scaled; with u = 2^-24,
// G floating-point groups and S the sum of the magnitudes of the terms added, y before its last rounding is
// within
//
//   (G + 5) u S
//
// of the exact value. Results do not depend on the order in which anything runs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/status.h"

namespace quantized_linear {

enum class Type : int { kHalf, kBFloat16, kFloat };
enum class Format : int { kW8A8, kW4A8, kW4A4 };
enum class Ending : int { kNone, kResidual, kGate };

constexpr int kSlice = 32;           // the products that one instruction adds
constexpr int kLargestGroup = 256;   // its int32 sums, of values up to 128, convert to float32 without loss
constexpr int kMostDecodeRows = 16;  // up to which the kernel for few rows is chosen

struct Problem {
  Format format;
  Type type;  // of y, and of the residual or gate
  Ending ending;
  int64_t rows;
  int64_t inputs;   // elements of a row of x
  int64_t outputs;  // rows of w
  int64_t group;    // a multiple of kSlice
  int64_t groups;
  int64_t row_scales;  // scales of a row of x: 1, or groups
  bool two_level;
  bool asymmetric;
};

struct Operands {
  const int8_t* x;
  const float* x_scale;       // [rows, row_scales]
  const float* x_zero;        // [rows], when asymmetric
  const int8_t* weight;       // [outputs, groups * group], or half as many bytes
  const int8_t* factors;      // [groups, outputs], when two-level
  const float* weight_scale;  // [groups, outputs], or [outputs] when two-level
  const float* weight_sum;    // [outputs], when asymmetric
  const float* bias;          // [outputs]
  const void* other;          // residual or gate [rows, outputs]
  void* y;
  void* workspace;  // Plan::workspace_bytes
};

// How columns of w are scaled: see Traits in quantized_linear_kernel.h.
enum class Scales : int { kChannel, kTwoLevel, kGroup, kRowGroup };

struct Geometry {
  int rows;
  int outputs;
  int x_bytes;       // of a row
  int weight_bytes;  // of a row
  int slices;        // of kSlice elements, of a row of w
  int group_slices;
  uint32_t group_inverse;  // slice * group_inverse >> kInverseShift is the slice's group
  int row_scales;
  int row_tiles;
  int column_tiles;
  int splits;        // thread blocks that share a tile, each with so many
  int split_slices;  // slices
  Type type;
  Ending ending;
  bool grouped;  // sums arrive scaled
  bool asymmetric;
  float factor;  // of the sums: what unpacking 4-bit integers multiplied them with, undone
};

constexpr int kInverseShift = 20;

struct Plan {
  Problem problem;
  Geometry geometry;
  Scales scales;
  bool decodes;  // which kernel
  size_t workspace_bytes;
};

// Chooses how to run a problem on a device with so many multiprocessors. The message of a failure names the
// offending size.
Status make_plan(const Problem& problem, unsigned multiprocessors, Plan& plan);

// The most workspace that a plan for this problem, or for the same with fewer rows, needs.
size_t largest_workspace(const Problem& problem, unsigned multiprocessors);

// Of the current device.
unsigned multiprocessors();

// Runs a plan; `stream` is a cudaStream_t. Operands are aligned to 16 bytes.
Status run(const Plan& plan, const Operands& operands, void* stream);

}  // namespace quantized_linear
