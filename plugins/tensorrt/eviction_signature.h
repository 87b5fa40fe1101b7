// The inputs of the operators that choose what stays: names, types and shapes, checked against an operator's
// attributes.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "kernels/eviction.h"

namespace rotexport {

// Positions of the inputs.
enum EvictionInput : int32_t {
  kEvictedPositions,
  kEvictedQuery,
  kEvictedQuerySink,
  kEvictedKey,
  kEvictedValue,
  kEvictedPastLength,
  kEvictedNewLength,
  kEvictedDecay,
  kEvictedCache  // and what follows, in the order of eviction::Cache
};

struct EvictionTensor {
  const char* name;
  bool is_activation;  // of the type of the queries
  nvinfer1::DataType type;
  std::vector<int64_t> shape;
};

// The inputs for the numbers of `problem`.
std::vector<EvictionTensor> eviction_inputs(const eviction::Problem& problem);

// Fills in the batch and the tokens that the shapes say, and throws PluginError where a shape is not what the
// numbers of `problem` ask for.
void read_shapes(const std::vector<nvinfer1::Dims>& shapes, eviction::Problem& problem);

}  // namespace rotexport
