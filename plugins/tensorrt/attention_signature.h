// The inputs of the sink/window operators: names, types and shapes, checked against an operator's attributes.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "kernels/attention.h"

namespace rotexport {

// What a tensor's elements are.
enum class ElementKind { kActivation, kCodes, kInt64, kInt32, kFloat };

struct InputSignature {
  const char* name;
  ElementKind kind;
  int32_t rank;
};

// Positions of the inputs that all operators have; the cache's tensors follow.
enum AttentionInput : int32_t {
  kPositions,
  kQuery,
  kQuerySink,
  kKey,
  kValue,
  kPastLength,
  kNewLength,
  kDecay,
  kCacheInputs
};

std::vector<InputSignature> attention_inputs(sink_window_attention::Format format, bool recent);

// Fills in the batch, tokens and groups that the shapes say, and throws PluginError where a shape is not what
// the numbers of `problem` ask for.
void read_shapes(const nvinfer1::Dims* shapes, const std::vector<InputSignature>& inputs,
                 sink_window_attention::Problem& problem);

}  // namespace rotexport
