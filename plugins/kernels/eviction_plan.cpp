#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "kernels/eviction.h"
#include "kernels/eviction_sizes.h"

namespace eviction {
namespace {

// A constant, not the device's width: sums are then taken in the same order on all GPUs.
constexpr int64_t kWantedBlocks = 1024;

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

Status fail(Policy policy, const std::string& message) {
  static thread_local std::string kept;
  kept = (policy == Policy::kSnap ? "SnapAttention: " : "HeavyHitterAttention: ") + message;
  return {kept.c_str()};
}

// What these operators share with sink/window attention is checked and described there.
Status describe(const Problem& p, Geometry& geometry) {
  sink_window_attention::Problem common{};
  common.type = p.type;
  common.format = sink_window_attention::Format::kFloat;
  common.batch = p.batch;
  common.tokens = p.tokens;
  common.query_heads = p.query_heads;
  common.kv_heads = p.kv_heads;
  common.head_size = p.head_size;
  common.value_size = p.value_size;
  common.sinks = p.sinks;
  common.window = p.window;
  common.scale = p.scale;
  common.softcap = p.softcap;
  sink_window_attention::Plan plan;
  const Status planned = sink_window_attention::make_plan(common, false, plan);
  if (!planned) return fail(p.policy, std::strchr(planned.message, ' ') + 1);
  geometry = plan.geometry;
  return {};
}

Status check(const Problem& p) {
  if (p.recent < 0 || p.recent > p.window) {
    return fail(p.policy, "recent is " + std::to_string(p.recent) +
                              ", must lie between 0 and the window of " + std::to_string(p.window));
  }
  if (p.context < 1) {
    return fail(p.policy, "context is " + std::to_string(p.context) + ", a query sees at least itself");
  }
  if (p.policy == Policy::kHeavyHitter && !(p.forget >= 0 && p.forget <= 1)) {
    return fail(p.policy, "forget is " + std::to_string(p.forget) + ", must lie between 0 and 1");
  }
  if (p.policy == Policy::kSnap && p.observe < 1) {
    return fail(p.policy, "observe is " + std::to_string(p.observe) + ", must be positive");
  }
  return {};
}

// Sections of the workspace, one behind the other.
class Sections {
 public:
  size_t add(int64_t words) {
    const size_t start = bytes_;
    bytes_ += static_cast<size_t>(ceil_div(words * 4, 256) * 256);
    return start;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

void lay_out(const Geometry& g, Plan& plan) {
  const int64_t heads = int64_t{g.batch} * g.kv_heads;
  const int64_t rows = heads * g.tokens * g.repeat;
  const int64_t parts = g.splits > 1 ? rows * g.splits : 0;
  const int64_t columns = heads * (int64_t{g.window} + g.tokens);
  const int64_t slots = heads * g.window;
  const int64_t logits = plan.few ? columns * g.tokens * g.repeat : 0;
  Sections sections;
  plan.offsets.sums = sections.add(parts * g.value_size);
  plan.offsets.weights = sections.add(parts * 2);
  plan.offsets.stats = sections.add(rows * 2);
  plan.offsets.logits = sections.add(logits);
  for (size_t* section : {&plan.offsets.mass, &plan.offsets.norm, &plan.offsets.score, &plan.offsets.rank}) {
    *section = sections.add(columns);
  }
  for (size_t* section : {&plan.offsets.source, &plan.offsets.position, &plan.offsets.kept}) {
    *section = sections.add(slots);
  }
  plan.offsets.moves = sections.add(heads * 2);
  plan.workspace_bytes = sections.bytes();
}

}  // namespace

Status make_plan(const Problem& problem, Plan& plan) {
  plan = Plan{};
  if (const Status described = describe(problem, plan.geometry); !described) return described;
  if (const Status checked = check(problem); !checked) return checked;
  constexpr int64_t kForever = 0x7fffffff;
  Geometry& g = plan.geometry;
  plan.problem = problem;
  plan.rules.policy = problem.policy;
  plan.rules.recent = static_cast<int>(problem.recent);
  plan.rules.context = static_cast<int>(std::min(problem.context, kForever));
  plan.rules.observe = static_cast<int>(std::min(problem.observe, kForever));
  plan.rules.log_forget = std::log2(problem.forget);
  const int sizes[] = {64, 80, 96, 128, 256};
  plan.size = *std::lower_bound(std::begin(sizes), std::end(sizes), std::max(g.head_size, g.value_size));
  g.row_tiles = static_cast<int>(ceil_div(int64_t{g.tokens} * g.repeat, kTile));
  const int64_t blocks = std::max<int64_t>(1, int64_t{g.batch} * g.kv_heads * g.row_tiles);
  const int64_t tiles = ceil_div(g.sinks, kTile) + ceil_div(g.window, kTile) + ceil_div(g.tokens, kTile);
  const int64_t useful = std::min<int64_t>(kMostSplits, tiles);
  g.splits = static_cast<int>(std::clamp<int64_t>(ceil_div(kWantedBlocks, blocks), 1, useful));
  plan.few = int64_t{g.tokens} * g.repeat <= kFewRows;
  lay_out(g, plan);
  return {};
}

// Fewer rows are split into more parts, or keep logits, so the largest call does not always need most: all
// are tried that are split or keep them.
size_t largest_workspace(const Problem& problem) {
  Plan plan{};
  size_t bytes = make_plan(problem, plan) ? plan.workspace_bytes : 0;
  Problem fewer = problem;
  for (fewer.batch = 1; fewer.batch <= problem.batch; ++fewer.batch) {
    for (fewer.tokens = 1; fewer.tokens <= problem.tokens; ++fewer.tokens) {
      if (!make_plan(fewer, plan) || (plan.geometry.splits == 1 && !plan.few)) break;
      bytes = std::max(bytes, plan.workspace_bytes);
    }
  }
  return bytes;
}

void cache_bytes(const Problem& p, size_t (&bytes)[kCacheTensors]) {
  const auto heads = static_cast<size_t>(p.batch * p.kv_heads);
  const auto slots = heads * static_cast<size_t>(p.window);
  const size_t sizes[2] = {static_cast<size_t>(p.head_size), static_cast<size_t>(p.value_size)};
  for (int i = 0; i < 2; ++i) {
    bytes[i] = heads * static_cast<size_t>(std::max<int64_t>(p.sinks, 1)) * sizes[i] * 2;
    bytes[2 + i] = slots * sizes[i] * 2;
    bytes[4 + i] = slots * 4;
  }
}

}  // namespace eviction
