#include "tensorrt/attention_signature.h"

#include <algorithm>

#include "tensorrt/plugin.h"

namespace rotexport {
namespace {

using sink_window_attention::Format;
using sink_window_attention::Problem;

std::string text(const std::vector<int64_t>& shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + "]";
}

int bits_of(Format format) { return format == Format::kInt8 ? 8 : format == Format::kInt4 ? 4 : 2; }

// The shape of an input, in the order of attention_inputs.
std::vector<int64_t> expected_shape(const Problem& p, int32_t input) {
  const int64_t sizes[2] = {p.head_size, p.value_size};
  const int64_t groups[2] = {p.key_groups, p.value_groups};
  const int side = input % 2;  // of the cache's tensors, which come in pairs of keys and values
  const bool coded = p.format != Format::kFloat;
  switch (input) {
    case kPositions:
      return {p.batch, p.tokens};
    case kQuery:
    case kQuerySink:
      return {p.batch, p.query_heads, p.tokens, p.head_size};
    case kKey:
      return {p.batch, p.kv_heads, p.tokens, p.head_size};
    case kValue:
      return {p.batch, p.kv_heads, p.tokens, p.value_size};
    case kPastLength:
    case kNewLength:
      return {p.batch};
    case kDecay:
      return {p.query_heads};
    case kCacheInputs:
    case kCacheInputs + 1:
      return {p.batch, p.kv_heads, std::max<int64_t>(p.sinks, 1), sizes[side]};
    case kCacheInputs + 2:
    case kCacheInputs + 3:
      return {p.batch, p.kv_heads, p.window, coded ? sizes[side] * bits_of(p.format) / 8 : sizes[side]};
    case kCacheInputs + 4:
    case kCacheInputs + 5:
      return {p.batch, p.kv_heads, p.window, groups[side], 2};
    default:
      return {p.batch, p.kv_heads, p.recent, sizes[side]};
  }
}

}  // namespace

std::vector<InputSignature> attention_inputs(Format format, bool recent) {
  const bool coded = format != Format::kFloat;
  const ElementKind window = coded ? ElementKind::kCodes : ElementKind::kActivation;
  std::vector<InputSignature> inputs = {
      {"positions", ElementKind::kInt64, 2},
      {"query", ElementKind::kActivation, 4},
      {"query_sink", ElementKind::kActivation, 4},
      {"key", ElementKind::kActivation, 4},
      {"value", ElementKind::kActivation, 4},
      {"past_length", ElementKind::kInt32, 1},
      {"new_length", ElementKind::kInt32, 1},
      {"decay", ElementKind::kFloat, 1},
      {"sink_key", ElementKind::kActivation, 4},
      {"sink_value", ElementKind::kActivation, 4},
      {"window_key", window, 4},
      {"window_value", window, 4},
  };
  if (coded) {
    inputs.push_back({"window_key_scale", ElementKind::kActivation, 5});
    inputs.push_back({"window_value_scale", ElementKind::kActivation, 5});
  }
  if (recent) {
    inputs.push_back({"recent_key", ElementKind::kActivation, 4});
    inputs.push_back({"recent_value", ElementKind::kActivation, 4});
  }
  return inputs;
}

void read_shapes(const nvinfer1::Dims* shapes, const std::vector<InputSignature>& inputs, Problem& problem) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (shapes[i].nbDims != inputs[i].rank) {
      throw PluginError{std::string("input '") + inputs[i].name + "' has " +
                        std::to_string(shapes[i].nbDims) + " axes, must have " +
                        std::to_string(inputs[i].rank)};
    }
  }
  problem.batch = shapes[kQuery].d[0];
  problem.tokens = shapes[kQuery].d[2];
  problem.key_groups = problem.value_groups = 1;
  if (problem.format != Format::kFloat) {
    problem.key_groups = shapes[kCacheInputs + 4].d[3];
    problem.value_groups = shapes[kCacheInputs + 5].d[3];
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::vector<int64_t> expected = expected_shape(problem, static_cast<int32_t>(i));
    const std::vector<int64_t> found(shapes[i].d, shapes[i].d + shapes[i].nbDims);
    if (found != expected) {
      throw PluginError{std::string("input '") + inputs[i].name + "' has shape " + text(found) +
                        ", must be " + text(expected)};
    }
  }
}

}  // namespace rotexport
