#include "kernels/attention_planning.h"

#include <algorithm>
#include <iterator>

namespace attention {
namespace {

constexpr int64_t kWantedBlocks = 1024;  // enough for some waves on the largest GPUs
constexpr int64_t kMostSplits = 64;
constexpr int64_t kMostElements = int64_t{1} << 30;  // of a tensor's row: 32-bit offsets

std::string complaint_about_head(const char* name, int64_t size) {
  if (size > 0 && size % 16 == 0 && size <= kLargestHead) return "";
  return std::string(name) + " is " + std::to_string(size) + ", the kernel needs a multiple of 16 up to " +
         std::to_string(kLargestHead);
}

}  // namespace

std::string complaint_about(const Sizes& s) {
  const std::string head = complaint_about_head("head_size", s.head_size);
  if (!head.empty()) return head;
  const std::string value = complaint_about_head("value_size", s.value_size);
  if (!value.empty()) return value;
  if (s.kv_heads < 1 || s.query_heads < 1 || s.query_heads % s.kv_heads != 0) {
    return "query_heads is " + std::to_string(s.query_heads) + ", no multiple of kv_heads " +
           std::to_string(s.kv_heads);
  }
  if (s.sinks < 0) return "sinks is " + std::to_string(s.sinks) + ", must not be negative";
  if (s.window < 1) return "window is " + std::to_string(s.window) + ", a query sees at least itself";
  if (!(s.scale > 0)) return "scale is " + std::to_string(s.scale) + ", must be positive";
  if (!(s.softcap >= 0)) return "softcap is " + std::to_string(s.softcap) + ", must not be negative";
  const int64_t longest = std::max({s.tokens * s.query_heads, s.window + s.tokens, s.sinks});
  if (s.batch < 0 || s.tokens < 0 || longest > kMostElements / kLargestHead ||
      s.batch * s.kv_heads * (longest + 1) > kMostElements) {
    return "a batch of " + std::to_string(s.batch) + " rows of " + std::to_string(s.tokens) +
           " tokens is too large";
  }
  return "";
}

void describe(const Sizes& s, Geometry& g) {
  g.batch = static_cast<int>(s.batch);
  g.tokens = static_cast<int>(s.tokens);
  g.query_heads = static_cast<int>(s.query_heads);
  g.kv_heads = static_cast<int>(s.kv_heads);
  g.repeat = g.query_heads / g.kv_heads;
  g.head_size = static_cast<int>(s.head_size);
  g.value_size = static_cast<int>(s.value_size);
  g.sinks = static_cast<int>(s.sinks);
  g.sink_slots = std::max(g.sinks, 1);
  g.window = static_cast<int>(s.window);
  g.scale = s.scale;
  g.softcap = s.softcap;
}

int padded_head(int64_t size) {
  return *std::lower_bound(std::begin(kHeadSizes), std::end(kHeadSizes), size);
}

int count_splits(int64_t blocks, int64_t useful) {
  const int64_t wanted = ceil_div(kWantedBlocks, std::max<int64_t>(1, blocks));
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::min(kMostSplits, useful)));
}

}  // namespace attention
