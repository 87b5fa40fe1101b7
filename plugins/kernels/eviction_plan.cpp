#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/attention_planning.h"
#include "kernels/eviction.h"
#include "kernels/eviction_sizes.h"

namespace eviction {
namespace {

Status fail(Policy policy, const std::string& message) {
  return refuse((policy == Policy::kSnap ? "SnapAttention: " : "HeavyHitterAttention: ") + message);
}

Status check(const Problem& p) {
  if (const std::string complaint = complaint_about(p); !complaint.empty()) return fail(p.policy, complaint);
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
    bytes_ += aligned(words * 4);
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
  if (const Status checked = check(problem); !checked) return checked;
  constexpr int64_t kForever = 0x7fffffff;
  Geometry& g = plan.geometry;
  describe(problem, g);
  plan.problem = problem;
  plan.rules.policy = problem.policy;
  plan.rules.recent = static_cast<int>(problem.recent);
  plan.rules.context = static_cast<int>(std::min(problem.context, kForever));
  plan.rules.observe = static_cast<int>(std::min(problem.observe, kForever));
  plan.rules.log_forget = std::log2(problem.forget);
  plan.size = padded_head(std::max(g.head_size, g.value_size));
  g.row_tiles = static_cast<int>(ceil_div(int64_t{g.tokens} * g.repeat, kTile));
  const int64_t tiles = ceil_div(g.sinks, kTile) + ceil_div(g.window, kTile) + ceil_div(g.tokens, kTile);
  g.splits = count_splits(int64_t{g.batch} * g.kv_heads * g.row_tiles, tiles);
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
