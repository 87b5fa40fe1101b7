#include "tensorrt/attention_signature.h"

#include <algorithm>
#include <iterator>

#include "kernels/attention_sizes.h"
#include "tensorrt/shapes.h"

namespace rotexport {
namespace {

using nvinfer1::DataType;
using sink_window_attention::Cache;
using sink_window_attention::Format;
using sink_window_attention::Operands;
using sink_window_attention::Problem;
using Input = AttentionInput;

constexpr AttentionForm kForms[kAttentionForms] = {
    {"SinkWindowAttention", Format::kFloat, false, false, false},
    {"SinkWindowAttentionInt8", Format::kInt8, false, false, false},
    {"SinkWindowAttentionInt8Recent", Format::kInt8, false, true, false},
    {"SinkWindowAttentionInt8Centered", Format::kInt8, true, false, false},
    {"SinkWindowAttentionInt8CenteredRecent", Format::kInt8, true, true, false},
    {"SinkWindowAttentionInt8CenteredRotated", Format::kInt8, true, false, true},
    {"SinkWindowAttentionInt8CenteredRecentRotated", Format::kInt8, true, true, true},
    {"SinkWindowAttentionInt8Rotated", Format::kInt8, false, false, true},
    {"SinkWindowAttentionInt8RecentRotated", Format::kInt8, false, true, true},
    {"SinkWindowAttentionInt4", Format::kInt4, false, false, false},
    {"SinkWindowAttentionInt4Recent", Format::kInt4, false, true, false},
    {"SinkWindowAttentionInt4Centered", Format::kInt4, true, false, false},
    {"SinkWindowAttentionInt4CenteredRecent", Format::kInt4, true, true, false},
    {"SinkWindowAttentionInt4CenteredRotated", Format::kInt4, true, false, true},
    {"SinkWindowAttentionInt4CenteredRecentRotated", Format::kInt4, true, true, true},
    {"SinkWindowAttentionInt4Rotated", Format::kInt4, false, false, true},
    {"SinkWindowAttentionInt4RecentRotated", Format::kInt4, false, true, true},
    {"SinkWindowAttentionInt2", Format::kInt2, false, false, false},
    {"SinkWindowAttentionInt2Recent", Format::kInt2, false, true, false},
    {"SinkWindowAttentionInt2Centered", Format::kInt2, true, false, false},
    {"SinkWindowAttentionInt2CenteredRecent", Format::kInt2, true, true, false},
    {"SinkWindowAttentionInt2CenteredRotated", Format::kInt2, true, false, true},
    {"SinkWindowAttentionInt2CenteredRecentRotated", Format::kInt2, true, true, true},
    {"SinkWindowAttentionInt2Rotated", Format::kInt2, false, false, true},
    {"SinkWindowAttentionInt2RecentRotated", Format::kInt2, false, true, true},
    {"SinkWindowAttentionFp8", Format::kFp8, false, false, false},
};

// Of the inputs behind those of all operators.
constexpr InputFacts kOwnFacts[] = {
    {"key_mean", Elements::kActivation, 4},
    {"mean_query", Elements::kActivation, 4},
    {"mean_angles", Elements::kActivation, 3},
    {"sink_key", Elements::kActivation, 4},
    {"sink_value", Elements::kActivation, 4},
    {"window_key", Elements::kWindow, 4},
    {"window_value", Elements::kWindow, 4},
    {"window_key_scale", Elements::kActivation, 5},
    {"window_value_scale", Elements::kActivation, 5},
    {"recent_key", Elements::kActivation, 4},
    {"recent_value", Elements::kActivation, 4},
    {"signs", Elements::kActivation, 1},
    {"base", Elements::kInt8, 2},
    {"hi", Elements::kInt8, 2},
    {"lo", Elements::kInt8, 2},
};

const InputFacts& facts_of(Input input) {
  const int i = static_cast<int>(input);
  return i < kCallInputs ? kCallFacts[i] : kOwnFacts[i - kCallInputs];
}

bool has(const AttentionForm& form, Input input) {
  if (input >= Input::kSigns) return form.rotated;
  if (input >= Input::kRecentKey) return form.recent;
  if (input >= Input::kWindowKeyScale) return form.format != Format::kFloat;
  if (input >= Input::kSinkKey) return true;
  return input < Input::kKeyMean || form.centered;
}

// The members of a cache, in the order of the inputs.
std::vector<void**> members(Cache& cache) {
  return {&cache.sink_key,         &cache.sink_value,         &cache.window_key, &cache.window_value,
          &cache.window_key_scale, &cache.window_value_scale, &cache.recent_key, &cache.recent_value};
}

}  // namespace

const AttentionForm& attention_form(int index) { return kForms[index]; }

AttentionSignature::AttentionSignature(int form) : form_(kForms[form]) {
  for (size_t i = 0; i < kCallInputs + std::size(kOwnFacts); ++i) {
    if (has(form_, static_cast<Input>(i))) inputs_.push_back(static_cast<Input>(i));
  }
}

int32_t AttentionSignature::index(Input input) const {
  const auto found = std::find(inputs_.begin(), inputs_.end(), input);
  return found == inputs_.end() ? -1 : static_cast<int32_t>(found - inputs_.begin());
}

const char* AttentionSignature::name(int32_t i) const { return facts_of(inputs_[i]).name; }

int32_t AttentionSignature::cached() const {
  return 4 + (form_.format == Format::kFloat ? 0 : 2) + (form_.recent ? 2 : 0);
}

DataType AttentionSignature::type(int32_t i, DataType activation) const {
  const DataType window = form_.format == Format::kFloat ? activation : DataType::kINT8;
  return type_of(facts_of(inputs_[i]).elements, activation, window);
}

void AttentionSignature::require_rank(int32_t i, int32_t rank) const {
  rotexport::require_rank(facts_of(inputs_[i]), rank);
}

std::vector<int64_t> AttentionSignature::expected_shape(int32_t i, const Problem& p) const {
  if (i < kCallInputs) return shape_of(static_cast<CallInput>(i), p);
  const bool value = i % 2 != first_cached() % 2;  // of the cache's pairs
  const int64_t size = value ? p.value_size : p.head_size;
  switch (inputs_[i]) {
    case Input::kKeyMean:
      return shape_of(kKeyInput, p);
      return {p.batch, p.kv_heads, p.tokens, p.head_size};
    case Input::kMeanQuery:
      return {p.batch, p.query_heads, p.tokens, p.angles};
    case Input::kMeanAngles:
      return {p.batch, p.window + p.tokens, p.angles};
    case Input::kSinkKey:
    case Input::kSinkValue:
      return {p.batch, p.kv_heads, std::max<int64_t>(p.sinks, 1), size};
    case Input::kWindowKey:
    case Input::kWindowValue:
      return {p.batch, p.kv_heads, p.window,
              p.format == Format::kFloat ? size : size * sink_window_attention::bits_of(p.format) / 8};
    case Input::kWindowKeyScale:
    case Input::kWindowValueScale:
      return {p.batch, p.kv_heads, p.window, value ? p.value_groups : p.key_groups,
              sink_window_attention::has_levels(p.format) ? 2 : 1};
    case Input::kRecentKey:
    case Input::kRecentValue:
      return {p.batch, p.kv_heads, p.recent, size};
    case Input::kSigns:
      return {p.head_size};
    default:
      return {1, 1};
  }
}

void AttentionSignature::read_shapes(const std::vector<nvinfer1::Dims>& shapes, Problem& problem) const {
  for (int32_t i = 0; i < count(); ++i) require_rank(i, shapes[i].nbDims);
  const auto dim = [&](Input input, int axis) { return shapes[index(input)].d[axis]; };
  problem.batch = dim(Input::kQuery, 0);
  problem.tokens = dim(Input::kQuery, 2);
  problem.key_groups = problem.value_groups = 1;
  if (form_.format != Format::kFloat) {
    problem.key_groups = dim(Input::kWindowKeyScale, 3);
    problem.value_groups = dim(Input::kWindowValueScale, 3);
  }
  problem.angles = form_.centered ? dim(Input::kMeanAngles, 2) : 0;
  if (form_.centered && problem.angles < 1) throw PluginError{"input 'mean_angles' has no angles"};
  for (int32_t i = 0; i < count(); ++i) {
    if (inputs_[i] == Input::kHigh || inputs_[i] == Input::kLow) continue;
    require_shape(facts_of(inputs_[i]), shapes[i], expected_shape(i, problem));
  }
  if (form_.rotated && dim(Input::kHigh, 0) * dim(Input::kLow, 0) != problem.head_size) {
    throw PluginError{"inputs 'hi' and 'lo' are for blocks of " +
                      std::to_string(dim(Input::kHigh, 0) * dim(Input::kLow, 0)) +
                      " channels, the kernel rotates whole heads of " + std::to_string(problem.head_size)};
  }
}

Operands AttentionSignature::operands(const void* const* inputs, void* const* outputs) const {
  for (int32_t i = kCallInputs; i < count(); ++i) {
    if (inputs_[i] != Input::kBase && inputs_[i] != Input::kHigh && inputs_[i] != Input::kLow) {
      require_aligned(inputs[i], name(i));
    }
  }
  const auto at = [&](Input input) { return index(input) < 0 ? nullptr : inputs[index(input)]; };
  Operands operands{};
  set_call(operands, inputs, outputs[0]);
  operands.key_mean = at(Input::kKeyMean);
  operands.mean_query = at(Input::kMeanQuery);
  operands.mean_angles = at(Input::kMeanAngles);
  operands.signs = at(Input::kSigns);
  const std::vector<void**> cache = members(operands.cache);
  const std::vector<void**> present = members(operands.present);
  for (size_t i = 0; i < cache.size(); ++i) {
    const int32_t from = index(static_cast<Input>(static_cast<size_t>(Input::kSinkKey) + i));
    if (from < 0) continue;
    *cache[i] = const_cast<void*>(inputs[from]);  // written only where it is the output, too
    *present[i] = outputs[1 + from - first_cached()];
    require_aligned(*present[i], name(from));
  }
  return operands;
}

}  // namespace rotexport
