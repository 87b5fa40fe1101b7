#include <algorithm>
#include <string>

#include "kernels/planning.h"
#include "kernels/quantized_linear_shape.h"

namespace quantized_linear {
namespace {

constexpr int64_t kLongest = int64_t{1} << 17;        // |x w| <= 2^14: a longer sum may pass int32
constexpr int64_t kLargestTensor = int64_t{1} << 32;  // bytes: offsets have 32 bits
constexpr unsigned kWaves = 2;  // of thread blocks to spread a problem over, before K is split further
constexpr int kMostSplits = 16;
constexpr int kLeastStages = 4;  // of a split

Status fail(const std::string& message) { return refuse("QuantizedLinear: " + message); }

int activation_bits(Format format) { return format == Format::kW4A4 ? 4 : 8; }
int weight_bits(Format format) { return format == Format::kW8A8 ? 8 : 4; }

Status check_scales(const Problem& p) {
  if (p.group < kSlice || p.group % kSlice != 0) {
    return fail("groups of " + std::to_string(p.group) + ": the kernel needs a multiple of " +
                std::to_string(kSlice));
  }
  if (p.groups < 1 || p.groups > kLongest / p.group || p.group * p.groups < p.inputs ||
      p.group * (p.groups - 1) >= p.inputs) {
    return fail(std::to_string(p.groups) + " groups of " + std::to_string(p.group) + " do not hold " +
                std::to_string(p.inputs) + " elements, of at most " + std::to_string(kLongest - kSlice));
  }
  if (p.group * p.groups >= kLongest) {
    return fail("rows of " + std::to_string(p.group * p.groups) +
                " elements overflow sums of 32 bits, which hold " + std::to_string(kLongest - kSlice));
  }
  if (p.row_scales != 1 && p.row_scales != p.groups) {
    return fail(std::to_string(p.row_scales) + " scales for a row of x, must be 1 or " +
                std::to_string(p.groups));
  }
  if (p.two_level && p.format == Format::kW8A8) return fail("factors widen 4-bit weights only");
  if ((p.two_level || p.asymmetric) && p.row_scales != 1) {
    return fail(std::to_string(p.row_scales) +
                " scales for a row of x: factors and zero points go with one scale for the row");
  }
  if (p.groups > 1 && !p.two_level && p.group > kLargestGroup) {
    return fail("groups of " + std::to_string(p.group) + " with a scale each: the kernel takes up to " +
                std::to_string(kLargestGroup));
  }
  return {};
}

Status check(const Problem& p) {
  if (p.rows < 0) return fail("negative number of rows " + std::to_string(p.rows));
  if (p.outputs < 1) return fail(std::to_string(p.outputs) + " outputs, must be at least 1");
  const int64_t bits = p.inputs * activation_bits(p.format);
  if (p.inputs < 1 || bits % 128 != 0) {
    return fail("rows of " + std::to_string(p.inputs) + " elements: the kernel needs a multiple of " +
                std::to_string(128 / activation_bits(p.format)));
  }
  const Status scales = check_scales(p);
  if (!scales) return scales;
  const int64_t largest = kLargestTensor / 4;
  if (p.outputs > largest / (p.group * p.groups) || (p.rows > 0 && p.outputs > largest / p.rows) ||
      p.rows > largest / p.inputs) {
    return fail("a product of " + std::to_string(p.rows) + " rows of " + std::to_string(p.inputs) + " with " +
                std::to_string(p.outputs) + " outputs is above 2^30 elements");
  }
  return {};
}

Scales scales_of(const Problem& p) {
  if (p.two_level) return Scales::kTwoLevel;
  if (p.groups == 1) return Scales::kChannel;
  return p.row_scales > 1 ? Scales::kRowGroup : Scales::kGroup;
}

// What unpacking multiplied the products with, undone.
float factor_of(const Problem& p) {
  const float x = activation_bits(p.format) == 4 ? 1.0f / 16 : 1.0f;
  return weight_bits(p.format) == 4 && !p.two_level ? x / 16 : x;
}

struct Tile {
  int rows;
  int columns;
  int slices;
};

template <class Shape>
Tile tile_of() {
  return {Shape::kRows, Shape::kColumns, Shape::kSlices};
}

Tile tile_of(const Plan& plan) {
  if (plan.decodes) return tile_of<DecodeShape<Format::kW4A8>>();
  return is_grouped(plan.scales) ? tile_of<GroupPrefillShape>() : tile_of<PrefillShape>();
}

// K is split where the tiles of y are too few for the device.
void choose_splits(unsigned multiprocessors, Plan& plan) {
  Geometry& g = plan.geometry;
  const Tile tile = tile_of(plan);
  g.row_tiles = static_cast<int>(ceil_div(g.rows, tile.rows));
  g.column_tiles = static_cast<int>(ceil_div(g.outputs, tile.columns));
  const int64_t tiles = std::max<int64_t>(1, int64_t{g.row_tiles} * g.column_tiles);
  const int64_t stages = ceil_div(g.slices, tile.slices);
  const int64_t wanted = int64_t{std::max(1u, multiprocessors)} * kWaves / tiles;
  const int64_t most = std::min<int64_t>(kMostSplits, std::max<int64_t>(1, stages / kLeastStages));
  const int64_t splits = std::clamp<int64_t>(wanted, 1, most);
  g.split_slices = static_cast<int>(ceil_div(stages, splits) * tile.slices);
  g.splits = static_cast<int>(ceil_div(g.slices, g.split_slices));
  plan.workspace_bytes = g.splits > 1 ? static_cast<size_t>(g.splits) * g.rows * g.outputs * 4 : 0;
}

}  // namespace

Status make_plan(const Problem& problem, unsigned multiprocessors, Plan& plan) {
  const Status checked = check(problem);
  if (!checked) return checked;
  plan = Plan{};
  plan.problem = problem;
  plan.scales = scales_of(problem);
  plan.decodes = problem.rows <= kMostDecodeRows;
  Geometry& g = plan.geometry;
  g.rows = static_cast<int>(problem.rows);
  g.outputs = static_cast<int>(problem.outputs);
  g.x_bytes = static_cast<int>(problem.inputs * activation_bits(problem.format) / 8);
  g.weight_bytes = static_cast<int>(problem.group * problem.groups * weight_bits(problem.format) / 8);
  g.slices = static_cast<int>(problem.group * problem.groups / kSlice);
  g.group_slices = static_cast<int>(problem.group / kSlice);
  g.group_inverse = static_cast<uint32_t>(ceil_div(int64_t{1} << kInverseShift, g.group_slices));
  g.row_scales = static_cast<int>(problem.row_scales);
  g.type = problem.type;
  g.ending = problem.ending;
  g.grouped = is_grouped(plan.scales);
  g.asymmetric = problem.asymmetric;
  g.factor = factor_of(problem);
  choose_splits(multiprocessors, plan);
  return {};
}

size_t largest_workspace(const Problem& problem, unsigned multiprocessors) {
  Problem fewer = problem;
  Plan plan;
  fewer.rows = std::min<int64_t>(kMostDecodeRows, problem.rows);
  size_t largest = make_plan(fewer, multiprocessors, plan) ? plan.workspace_bytes : 0;
  // Of as many tiles, full ones need the most; once there are enough of them, K is not split.
  for (int64_t full = PrefillShape::kRows; fewer.rows < problem.rows; full += PrefillShape::kRows) {
    fewer.rows = std::min(full, problem.rows);
    if (!make_plan(fewer, multiprocessors, plan) || plan.geometry.splits == 1) break;
    largest = std::max(largest, plan.workspace_bytes);
  }
  return largest;
}

}  // namespace quantized_linear
