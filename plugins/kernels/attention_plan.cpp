#include <algorithm>
#include <string>

#include "kernels/attention.h"
#include "kernels/attention_sizes.h"

namespace sink_window_attention {
namespace {

// Enough thread blocks for some waves on the largest GPUs. A constant: sums are then taken in the same order
// on all of them.
constexpr int64_t kWantedBlocks = 1024;
constexpr int kMostSplits = 64;
constexpr int kSharedBytes = 99 * 1024;              // of a thread block, on the smallest architecture
constexpr int64_t kMostElements = int64_t{1} << 30;  // of a tensor's row: 32-bit offsets

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
size_t aligned(int64_t bytes) { return static_cast<size_t>(ceil_div(bytes, 256) * 256); }

Status fail(const std::string& message) {
  static thread_local std::string kept;
  kept = "SinkWindowAttention: " + message;
  return {kept.c_str()};
}

Status check_head(const char* name, int64_t size) {
  if (size > 0 && size % 16 == 0 && size <= kLargestHead) return {};
  return fail(std::string(name) + " is " + std::to_string(size) +
              ", the kernel needs a multiple of 16 up to " + std::to_string(kLargestHead));
}

Status check_groups(const char* name, int64_t groups, int64_t size) {
  if (groups > 0 && size % groups == 0 && size / groups % 16 == 0) return {};
  return fail(std::to_string(groups) + " groups of a " + name + " head of " + std::to_string(size) +
              " channels: the kernel needs groups of a multiple of 16 channels");
}

int64_t extended_size(const Problem& p) { return p.head_size + ceil_div(p.angles, 16) * 16; }

Status check_rows(const Problem& p) {
  if ((p.angles > 0 || p.rotated) && !has_levels(p.format)) {
    return fail("centered and rotated keys are for windows of int8, int4 and int2 codes");
  }
  if (p.angles < 0 || extended_size(p) > kLargestHead) {
    return fail(std::to_string(p.angles) + " angles of a head of " + std::to_string(p.head_size) +
                " channels: the kernel needs at most " + std::to_string(kLargestHead) + " of both");
  }
  if (p.rotated && (p.head_size & (p.head_size - 1)) != 0) {
    return fail("head_size is " + std::to_string(p.head_size) +
                ", the kernel rotates heads of a power of two channels");
  }
  return {};
}

int smallest_of(const int (&sizes)[5], int size) {
  return *std::find_if(std::begin(sizes), std::end(sizes), [size](int padded) { return padded >= size; });
}

int decoded_size(const Problem& p) {
  return smallest_of({64, 64, 64, 128, 256}, static_cast<int>(std::max(p.head_size, p.value_size)));
}

int stage_bytes(const Problem& p) {
  const int size = decoded_size(p);
  const int in_float = tile_bytes(size, Format::kFloat, 0);
  if (p.format == Format::kFloat) return in_float;
  return std::max(in_float, tile_bytes(size, p.format, static_cast<int>(p.key_groups + p.value_groups)));
}

int decode_shared_bytes(const Problem& p) {
  const int size = decoded_size(p);
  const int per_row = 2 * 2 * static_cast<int>(sizeof(float));  // position and slope, maximum and sum
  return decode_warps(size) * (kDecodeStages * stage_bytes(p) + query_bytes(size) + kDecodeRows * per_row);
}

Status check(const Problem& p) {
  if (const Status status = check_head("head_size", p.head_size); !status) return status;
  if (const Status status = check_head("value_size", p.value_size); !status) return status;
  if (p.kv_heads < 1 || p.query_heads < 1 || p.query_heads % p.kv_heads != 0) {
    return fail("query_heads is " + std::to_string(p.query_heads) + ", no multiple of kv_heads " +
                std::to_string(p.kv_heads));
  }
  if (p.sinks < 0) return fail("sinks is " + std::to_string(p.sinks) + ", must not be negative");
  if (p.window < 1) return fail("window is " + std::to_string(p.window) + ", a query sees at least itself");
  if (p.recent < 0 || p.recent > p.window) {
    return fail("recent is " + std::to_string(p.recent) + ", must lie between 1 and the window of " +
                std::to_string(p.window));
  }
  if (p.recent > 0 && !has_levels(p.format)) {
    return fail("recent is for windows of int8, int4 and int2 codes");
  }
  if (const Status status = check_rows(p); !status) return status;
  if (!(p.scale > 0)) return fail("scale is " + std::to_string(p.scale) + ", must be positive");
  if (!(p.softcap >= 0)) return fail("softcap is " + std::to_string(p.softcap) + ", must not be negative");
  if (p.format != Format::kFloat) {
    if (const Status status = check_groups("key", p.key_groups, p.head_size); !status) return status;
    if (const Status status = check_groups("value", p.value_groups, p.value_size); !status) return status;
    if (decode_shared_bytes(p) > kSharedBytes) {
      return fail(std::to_string(p.key_groups + p.value_groups) +
                  " groups of a head's keys and values take more than " +
                  std::to_string(kSharedBytes / 1024) + " KB of shared memory: use larger groups");
    }
  }
  const int64_t longest = std::max({p.tokens * p.query_heads, p.window + p.tokens, p.sinks});
  if (p.batch < 0 || p.tokens < 0 || longest > kMostElements / kLargestHead ||
      p.batch * p.kv_heads * (longest + 1) > kMostElements) {
    return fail("a batch of " + std::to_string(p.batch) + " rows of " + std::to_string(p.tokens) +
                " tokens is too large");
  }
  return {};
}

void describe(const Problem& p, Geometry& g) {
  g.batch = static_cast<int>(p.batch);
  g.tokens = static_cast<int>(p.tokens);
  g.query_heads = static_cast<int>(p.query_heads);
  g.kv_heads = static_cast<int>(p.kv_heads);
  g.repeat = g.query_heads / g.kv_heads;
  g.head_size = static_cast<int>(p.head_size);
  g.value_size = static_cast<int>(p.value_size);
  g.sinks = static_cast<int>(p.sinks);
  g.sink_slots = std::max(g.sinks, 1);
  g.window = static_cast<int>(p.window);
  g.recent = static_cast<int>(p.recent);
  g.key_groups = static_cast<int>(p.format == Format::kFloat ? 1 : p.key_groups);
  g.value_groups = static_cast<int>(p.format == Format::kFloat ? 1 : p.value_groups);
  g.key_group = g.head_size / g.key_groups;
  g.value_group = g.value_size / g.value_groups;
  g.angles = static_cast<int>(p.angles);
  g.key_row = static_cast<int>(extended_size(p));
  g.key_group_inverse = static_cast<int>(ceil_div(65536, g.key_group));
  g.value_group_inverse = static_cast<int>(ceil_div(65536, g.value_group));
  g.scale = p.scale;
  g.softcap = p.softcap;
}

void plan_prefill(const Problem& p, Plan& plan) {
  Geometry& g = plan.geometry;
  plan.size = smallest_of({64, 80, 96, 128, 256}, std::max(g.key_row, g.value_size));
  g.row_tiles = static_cast<int>(ceil_div(p.tokens * g.repeat, prefill_rows(plan.size)));
  g.splits = 1;
  if (p.format == Format::kFloat) return;
  const int64_t staged = p.batch * p.kv_heads * (p.window + p.tokens) * 2;
  plan.values_offset = aligned(staged * g.key_row);
  plan.workspace_bytes = plan.values_offset + aligned(staged * p.value_size);
}

// Behind what else is in the workspace.
void plan_rows(const Problem& p, Plan& plan) {
  plan.rows_offset = plan.workspace_bytes;
  if (!arranges_rows(plan)) return;
  const int64_t cached = extends_rows(plan) ? plan.geometry.sink_slots + p.recent : 0;
  const int64_t rows = 2 * p.query_heads * p.tokens + p.kv_heads * (p.tokens + cached);
  const int64_t stored = extends_rows(plan) && p.rotated ? p.kv_heads * p.tokens * p.head_size : 0;
  plan.workspace_bytes += aligned(p.batch * (rows * arranged_width(plan) + stored) * 2);
}

// With less than a block's rows, or few tiles to copy ahead, there is little that warpgroups could overlap.
bool fills_warpgroups(const Problem& p, const Plan& plan) {
  constexpr int64_t kLeastTiles = 4;
  return p.tokens * plan.geometry.repeat >= prefill_rows(plan.size) &&
         p.window + p.sinks >= kLeastTiles * kWarpgroupKeys;
}

void plan_decode(const Problem& p, Plan& plan) {
  Geometry& g = plan.geometry;
  plan.size = decoded_size(p);
  const int warps = decode_warps(plan.size);
  const int64_t rows = p.tokens * g.repeat;
  g.row_tiles = static_cast<int>(ceil_div(rows, kDecodeRows));
  const int64_t tiles =
      ceil_div(p.sinks, tile_keys(Format::kFloat)) + ceil_div(p.window + p.tokens, tile_keys(p.format));
  const int64_t blocks = std::max<int64_t>(1, p.batch * p.kv_heads * g.row_tiles);
  const int64_t useful = std::min<int64_t>(kMostSplits, ceil_div(tiles, warps));
  g.splits = static_cast<int>(std::clamp<int64_t>(ceil_div(kWantedBlocks, blocks), 1, useful));
  g.stage_bytes = stage_bytes(p);
  plan.threads = 32 * warps;
  plan.shared_bytes = static_cast<unsigned>(decode_shared_bytes(p));
  const int64_t parts = p.batch * p.kv_heads * rows * g.splits;
  plan.weights_offset = aligned(parts * p.value_size * static_cast<int64_t>(sizeof(float)));
  plan.means_offset = plan.weights_offset + aligned(parts * 2 * static_cast<int64_t>(sizeof(float)));
  const int64_t means = p.angles > 0 ? p.batch * p.query_heads * p.tokens * mean_row(g) : 0;
  plan.workspace_bytes = plan.means_offset + aligned(means * static_cast<int64_t>(sizeof(float)));
}

}  // namespace

bool warpgroups_take(const Plan& plan) { return !plan.decodes && (plan.size == 64 || plan.size == 128); }

Status make_plan(const Problem& problem, bool warpgroups, Plan& plan) {
  const Status checked = check(problem);
  if (!checked) return checked;
  plan = Plan{};
  plan.problem = problem;
  plan.decodes = problem.tokens <= kMostDecodedTokens;
  describe(problem, plan.geometry);
  plan.decodes ? plan_decode(problem, plan) : plan_prefill(problem, plan);
  plan_rows(problem, plan);
  plan.on_warpgroups = warpgroups && warpgroups_take(plan) && fills_warpgroups(problem, plan);
  return {};
}

// Fewer rows are split into more parts, so the largest batch does not always need most: all are tried.
size_t largest_workspace(const Problem& problem) {
  Plan plan{};
  size_t bytes = make_plan(problem, false, plan) ? plan.workspace_bytes : 0;
  Problem fewer = problem;
  fewer.tokens = std::min<int64_t>(problem.tokens, kMostDecodedTokens);
  for (; fewer.tokens > 0; --fewer.tokens) {
    for (fewer.batch = 1; fewer.batch <= problem.batch; ++fewer.batch) {
      if (make_plan(fewer, false, plan)) bytes = std::max(bytes, plan.workspace_bytes);
    }
  }
  return bytes;
}

void cache_bytes(const Problem& p, size_t (&bytes)[8]) {
  const auto heads = static_cast<size_t>(p.batch * p.kv_heads);
  const size_t sizes[2] = {static_cast<size_t>(p.head_size), static_cast<size_t>(p.value_size)};
  const size_t groups[2] = {static_cast<size_t>(p.key_groups), static_cast<size_t>(p.value_groups)};
  const bool coded = p.format != Format::kFloat;
  for (int i = 0; i < 2; ++i) {
    bytes[i] = heads * static_cast<size_t>(std::max<int64_t>(p.sinks, 1)) * sizes[i] * 2;
    bytes[2 + i] = heads * static_cast<size_t>(p.window) * sizes[i] * bits_of(p.format) / 8;
    bytes[4 + i] = coded ? heads * static_cast<size_t>(p.window) * groups[i] * scale_bytes(p.format) : 0;
    bytes[6 + i] = heads * static_cast<size_t>(p.recent) * sizes[i] * 2;
  }
}

}  // namespace sink_window_attention
