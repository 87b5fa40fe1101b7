// The inputs of the operators that choose what stays.
#pragma once

#include "kernels/eviction.h"
#include "tensorrt/call_signature.h"

namespace rotexport {

class EvictionSignature {
 public:
  explicit EvictionSignature(eviction::Policy policy) : policy_(policy) {}

  int32_t count() const { return kCallInputs + eviction::kCacheTensors; }

  // The cache's inputs follow each other: the first one and their number.
  int32_t first_cached() const { return kCallInputs; }
  int32_t cached() const { return eviction::kCacheTensors; }

  // The type of input i; `activation` is that of the queries.
  nvinfer1::DataType type(int32_t i, nvinfer1::DataType activation) const;
  void require_rank(int32_t i, int32_t rank) const { rotexport::require_rank(facts(i), rank); }

  // Fills in the batch and the tokens that the shapes say; refuses a shape that is not what the numbers of
  // `problem` ask for.
  void read_shapes(const std::vector<nvinfer1::Dims>& shapes, eviction::Problem& problem) const;

  eviction::Operands operands(const void* const* inputs, void* const* outputs) const;

 private:
  InputFacts facts(int32_t i) const;

  eviction::Policy policy_;
};

}  // namespace rotexport
