#include "tensorrt/eviction_signature.h"

#include <algorithm>
#include <string>

#include "tensorrt/plugin.h"

namespace rotexport {
namespace {

std::string text(const std::vector<int64_t>& shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + "]";
}

}  // namespace

std::vector<EvictionTensor> eviction_inputs(const eviction::Problem& p) {
  using nvinfer1::DataType;
  const std::vector<int64_t> query = {p.batch, p.query_heads, p.tokens, p.head_size};
  const std::vector<int64_t> slots = {p.batch, p.kv_heads, p.window};
  const auto activation = [](const char* name, const std::vector<int64_t>& shape) {
    return EvictionTensor{name, true, DataType::kHALF, shape};
  };
  const auto tokens = [&](const char* name, int64_t count, int64_t size) {
    return activation(name, {p.batch, p.kv_heads, count, size});
  };
  const int64_t sinks = std::max<int64_t>(p.sinks, 1);
  return {
      {"positions", false, DataType::kINT64, {p.batch, p.tokens}},
      activation("query", query),
      activation("query_sink", query),
      tokens("key", p.tokens, p.head_size),
      tokens("value", p.tokens, p.value_size),
      {"past_length", false, DataType::kINT32, {p.batch}},
      {"new_length", false, DataType::kINT32, {p.batch}},
      {"decay", false, DataType::kFLOAT, {p.query_heads}},
      tokens("sink_key", sinks, p.head_size),
      tokens("sink_value", sinks, p.value_size),
      tokens("window_key", p.window, p.head_size),
      tokens("window_value", p.window, p.value_size),
      {"window_position", false, DataType::kINT32, slots},
      {p.policy == eviction::Policy::kSnap ? "window_observed" : "window_score", false, DataType::kFLOAT,
       slots},
  };
}

void read_shapes(const std::vector<nvinfer1::Dims>& shapes, eviction::Problem& problem) {
  const std::vector<EvictionTensor> ranks = eviction_inputs(problem);
  if (shapes.size() != ranks.size()) {
    throw PluginError{std::to_string(shapes.size()) + " inputs, must be " + std::to_string(ranks.size())};
  }
  for (size_t i = 0; i < shapes.size(); ++i) {
    if (static_cast<size_t>(shapes[i].nbDims) == ranks[i].shape.size()) continue;
    throw PluginError{std::string("input '") + ranks[i].name + "' has " + std::to_string(shapes[i].nbDims) +
                      " axes, must have " + std::to_string(ranks[i].shape.size())};
  }
  problem.batch = shapes[kEvictedQuery].d[0];
  problem.tokens = shapes[kEvictedQuery].d[2];
  const std::vector<EvictionTensor> expected = eviction_inputs(problem);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const std::vector<int64_t> found(shapes[i].d, shapes[i].d + shapes[i].nbDims);
    if (found == expected[i].shape) continue;
    throw PluginError{std::string("input '") + expected[i].name + "' has shape " + text(found) +
                      ", must be " + text(expected[i].shape)};
  }
}

}  // namespace rotexport
