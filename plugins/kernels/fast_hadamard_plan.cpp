#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/fast_hadamard.h"
#include "kernels/planning.h"

namespace fast_hadamard {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;
constexpr int kUsualWarps = 8;
constexpr int64_t kLongestRow = int64_t{1} << 28;  // 32-bit offsets in bytes

bool power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }
int log2_of(int64_t power) { return power > 1 ? 1 + log2_of(power / 2) : 0; }

Status fail(const std::string& message) { return refuse("FastHadamard: " + message); }

Status check(const Problem& problem) {
  const int64_t m = problem.base_order;
  const int64_t s = problem.sylvester_order;
  if (m != 1 && m != 2 && (m < 4 || m % 4 != 0)) {
    return fail("base order " + std::to_string(m) + ": Hadamard matrices have order 1, 2 or a multiple of 4");
  }
  if (!power_of_two(s))
    return fail("order " + std::to_string(s) + " of the Sylvester factors is no power of two");
  if (m > kLongest || s > kLongest || m * s > kLongest) {
    return fail("length " + std::to_string(m) + " * " + std::to_string(s) + " is above " +
                std::to_string(kLongest));
  }
  if (problem.row <= 0 || problem.row % (m * s) != 0) {
    return fail("the last axis has " + std::to_string(problem.row) + " elements, no multiple of the length " +
                std::to_string(m * s));
  }
  if (problem.row % 4 != 0 || problem.row > kLongestRow) {
    return fail("the last axis has " + std::to_string(problem.row) +
                " elements: the kernel needs a multiple of 4 up to 2^28");
  }
  if (problem.rows > (int64_t{1} << 40) / problem.row) {
    return fail(std::to_string(problem.rows) + " rows of " + std::to_string(problem.row) +
                " elements are above 2^40");
  }
  if (problem.rows < 0) return fail("negative number of rows " + std::to_string(problem.rows));
  if (problem.output != Output::kSame && !(problem.clip > 0 && problem.clip <= 1)) {
    return fail("clip " + std::to_string(problem.clip) + " is outside (0, 1]");
  }
  return {};
}

// The matrix view of a block.
void choose_shape(const Problem& problem, Geometry& geometry) {
  const int m = static_cast<int>(problem.base_order);
  const int s = static_cast<int>(problem.sylvester_order);
  const int n = m * s;
  int columns = 1;
  geometry.base_order = m;
  geometry.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  if (n < 4) {
    // Too short for a tile of its own: blocks are gathered along a diagonal. Alone for n = 1, nothing mixes
    // columns.
    geometry.order = 4;
    geometry.repeat_mask = n - 1;
    geometry.log_sylvester = log2_of(s);
    if (n == 1 && problem.row % kTileRows == 0) {
      geometry.order = kTileRows;
      while (columns < kTileColumns && problem.row % (2 * columns * kTileRows) == 0) columns *= 2;
    }
    geometry.stages = 0;
  } else {
    const int from_sylvester = m < 12 ? std::min(kTileRows / m, s) : 1;
    geometry.order = m * from_sylvester;
    geometry.repeat_mask = -1;
    geometry.log_sylvester = log2_of(from_sylvester);
    columns = s / from_sylvester;
    geometry.stages = log2_of(columns);
  }
  geometry.log_columns = log2_of(columns);
  geometry.block = geometry.order * columns;
}

// Tiles per warp, and how they are spread over thread blocks.
void choose_tiles(const Problem& problem, Plan& plan) {
  Geometry& g = plan.geometry;
  const int columns = 1 << g.log_columns;
  const int row_tiles = static_cast<int>(ceil_div(g.order, kTileRows));
  const bool quantizes = problem.output != Output::kSame;
  Variant& variant = plan.variant;
  variant.column_class = std::min(g.log_columns, 3);
  variant.column_tiles = columns > kTileColumns ? 2 : 1;
  variant.exchange = std::max(1, columns / (2 * kTileColumns));
  variant.row_tiles = variant.column_tiles == 1 && variant.column_class == 3 && row_tiles > 1 ? 2 : 1;
  g.row_groups = static_cast<int>(ceil_div(row_tiles, variant.row_tiles));
  g.group_step = g.block * std::max(1, kTileColumns / columns);
  int warps;
  if (variant.exchange > 1) {
    warps = row_tiles * variant.exchange;
    g.unit = quantizes ? g.row : g.block;
    g.rounds = g.unit / g.block;
    g.tiles = warps;
  } else {
    const int steps = std::max(1, kUsualWarps / g.row_groups);
    g.unit = quantizes ? g.row * std::max(1, steps * g.group_step / g.row) : steps * g.group_step;
    g.tiles = static_cast<int>(ceil_div(g.unit, g.group_step)) * g.row_groups;
    warps = std::min(variant.column_tiles == 2 ? kMaxLongWarps : kMaxWarps, g.tiles);
    g.rounds = static_cast<int>(ceil_div(g.tiles, warps));
  }
  g.units = static_cast<unsigned>(ceil_div(g.elements, g.unit));
  g.tokens = quantizes ? g.unit / g.row : 0;
  plan.threads = 32 * warps;
  plan.peak_bytes = static_cast<unsigned>(ceil_div(g.tokens * 4, 16) * 16);
  const int exchanged_rows = variant.exchange > 1 ? kTileRows / 2 * row_tiles : 0;
  plan.shared_bytes = plan.peak_bytes + exchanged_rows * columns * static_cast<unsigned>(sizeof(float));
  // One bit per entry of the matrix, in words of four tiles side by side; narrow matrices are kept in
  // registers.
  const size_t words = g.row_groups * variant.row_tiles * ceil_div(row_tiles, 4) * 32;
  plan.workspace_bytes = row_tiles > 1 ? words * sizeof(uint32_t) : 0;
}

}  // namespace

Status make_plan(const Problem& problem, Plan& plan) {
  const Status checked = check(problem);
  if (!checked) return checked;
  plan = Plan{};
  plan.problem = problem;
  plan.geometry.elements = problem.rows * problem.row;
  plan.geometry.row = static_cast<int>(problem.row);
  plan.geometry.quantum = problem.clip / (problem.output == Output::kInt4 ? 7.0f : 127.0f);
  choose_shape(problem, plan.geometry);
  choose_tiles(problem, plan);
  if (plan.threads > 32 * kMaxLongWarps) {
    return fail("length " + std::to_string(problem.base_order) + " * " +
                std::to_string(problem.sylvester_order) + " needs more than " +
                std::to_string(kMaxLongWarps) + " warps");
  }
  return {};
}

}  // namespace fast_hadamard
