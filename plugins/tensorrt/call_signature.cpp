#include "tensorrt/call_signature.h"

#include <string>

#include "tensorrt/shapes.h"

namespace rotexport {
namespace {

using nvinfer1::DataType;

std::string text(const std::vector<int64_t>& shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + "]";
}

}  // namespace

DataType type_of(Elements elements, DataType activation, DataType window) {
  switch (elements) {
    case Elements::kWindow:
      return window;
    case Elements::kInt8:
      return DataType::kINT8;
    case Elements::kInt64:
      return DataType::kINT64;
    case Elements::kInt32:
      return DataType::kINT32;
    case Elements::kFloat:
      return DataType::kFLOAT;
    default:
      return activation;
  }
}

attention::Type kernel_type(DataType activation) {
  if (activation == DataType::kHALF) return attention::Type::kHalf;
  if (activation == DataType::kBF16) return attention::Type::kBFloat16;
  throw PluginError{"input 'query' must be float16 or bfloat16"};
}

void require_rank(const InputFacts& input, int32_t rank) {
  if (rank == input.rank) return;
  throw PluginError{std::string("input '") + input.name + "' has " + std::to_string(rank) +
                    " axes, must have " + std::to_string(input.rank)};
}

void require_shape(const InputFacts& input, const nvinfer1::Dims& found,
                   const std::vector<int64_t>& expected) {
  if (std::vector<int64_t>(found.d, found.d + found.nbDims) == expected) return;
  throw PluginError{std::string("input '") + input.name + "' has shape " + text(found) + ", must be " +
                    text(expected)};
}

std::vector<int64_t> shape_of(CallInput input, const attention::Sizes& s) {
  switch (input) {
    case kPositionsInput:
      return {s.batch, s.tokens};
    case kQueryInput:
    case kQuerySinkInput:
      return {s.batch, s.query_heads, s.tokens, s.head_size};
    case kKeyInput:
      return {s.batch, s.kv_heads, s.tokens, s.head_size};
    case kValueInput:
      return {s.batch, s.kv_heads, s.tokens, s.value_size};
    case kDecayInput:
      return {s.query_heads};
    default:
      return {s.batch};
  }
}

void set_call(attention::CallOperands& operands, const void* const* inputs, void* output) {
  for (int32_t i = 0; i < kCallInputs; ++i) require_aligned(inputs[i], kCallFacts[i].name);
  require_aligned(output, "output");
  operands.query = inputs[kQueryInput];
  operands.query_sink = inputs[kQuerySinkInput];
  operands.key = inputs[kKeyInput];
  operands.value = inputs[kValueInput];
  operands.past_length = static_cast<const int32_t*>(inputs[kPastLengthInput]);
  operands.new_length = static_cast<const int32_t*>(inputs[kNewLengthInput]);
  operands.decay = static_cast<const float*>(inputs[kDecayInput]);
  operands.output = output;
}

}  // namespace rotexport
