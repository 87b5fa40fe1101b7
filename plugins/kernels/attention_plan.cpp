#include <algorithm>
#include <string>

#include "kernels/attention.h"
#include "kernels/attention_planning.h"
#include "kernels/attention_sizes.h"

namespace sink_window_attention {
namespace {

constexpr int kSharedBytes = 99 * 1024;  // of a thread block, on the smallest architecture

Status fail(const std::string& message) { return refuse("SinkWindowAttention: " + message); }

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

// Decoding has kernels for fewer sizes.
int decoded_size(const Problem& p) {
  const int size = padded_head(std::max(p.head_size, p.value_size));
  return size <= 64 ? 64 : std::max(size, 128);
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
  if (const std::string complaint = complaint_about(p); !complaint.empty()) return fail(complaint);
  if (p.recent < 0 || p.recent > p.window) {
    return fail("recent is " + std::to_string(p.recent) + ", must lie between 1 and the window of " +
                std::to_string(p.window));
  }
  if (p.recent > 0 && !has_levels(p.format)) {
    return fail("recent is for windows of int8, int4 and int2 codes");
  }
  if (const Status status = check_rows(p); !status) return status;
  if (p.format != Format::kFloat) {
    if (const Status status = check_groups("key", p.key_groups, p.head_size); !status) return status;
    if (const Status status = check_groups("value", p.value_groups, p.value_size); !status) return status;
    if (decode_shared_bytes(p) > kSharedBytes) {
      return fail(std::to_string(p.key_groups + p.value_groups) +
                  " groups of a head's keys and values take more than " +
                  std::to_string(kSharedBytes / 1024) + " KB of shared memory: use larger groups");
    }
  }
  return {};
}

void describe(const Problem& p, Geometry& g) {
  attention::describe(p, g);
  g.recent = static_cast<int>(p.recent);
  g.key_groups = static_cast<int>(p.format == Format::kFloat ? 1 : p.key_groups);
  g.value_groups = static_cast<int>(p.format == Format::kFloat ? 1 : p.value_groups);
  g.key_group = g.head_size / g.key_groups;
  g.value_group = g.value_size / g.value_groups;
  g.angles = static_cast<int>(p.angles);
  g.key_row = static_cast<int>(extended_size(p));
  g.key_group_inverse = static_cast<int>(ceil_div(65536, g.key_group));
  g.value_group_inverse = static_cast<int>(ceil_div(65536, g.value_group));
}

void plan_prefill(const Problem& p, Plan& plan) {
  Geometry& g = plan.geometry;
  plan.size = padded_head(std::max(g.key_row, g.value_size));
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
  g.splits = count_splits(p.batch * p.kv_heads * g.row_tiles, ceil_div(tiles, warps));
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
