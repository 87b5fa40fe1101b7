// What attention operators share of their inputs: those that they all begin with, and checks of any.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "kernels/attention_call.h"

namespace rotexport {

// Positions of the inputs that all operators begin with.
enum CallInput : int32_t {
  kPositionsInput,
  kQueryInput,
  kQuerySinkInput,
  kKeyInput,
  kValueInput,
  kPastLengthInput,
  kNewLengthInput,
  kDecayInput,
  kCallInputs
};

// What a tensor's elements are.
enum class Elements { kActivation, kWindow, kInt8, kInt64, kInt32, kFloat };

struct InputFacts {
  const char* name;
  Elements elements;
  int32_t rank;
};

constexpr InputFacts kCallFacts[kCallInputs] = {
    {"positions", Elements::kInt64, 2},       {"query", Elements::kActivation, 4},
    {"query_sink", Elements::kActivation, 4}, {"key", Elements::kActivation, 4},
    {"value", Elements::kActivation, 4},      {"past_length", Elements::kInt32, 1},
    {"new_length", Elements::kInt32, 1},      {"decay", Elements::kFloat, 1},
};

// Where queries are of type `activation`, and the window of type `window`.
nvinfer1::DataType type_of(Elements elements, nvinfer1::DataType activation, nvinfer1::DataType window);

// The type of queries; throws PluginError where no kernel takes it.
attention::Type kernel_type(nvinfer1::DataType activation);

// Throw PluginError where an input is not as it must be.
void require_rank(const InputFacts& input, int32_t rank);
void require_shape(const InputFacts& input, const nvinfer1::Dims& found,
                   const std::vector<int64_t>& expected);

std::vector<int64_t> shape_of(CallInput input, const attention::Sizes& sizes);

// Fills in the operands that all operators have; throws PluginError where a kernel cannot take their address.
void set_call(attention::CallOperands& operands, const void* const* inputs, void* output);

}  // namespace rotexport
