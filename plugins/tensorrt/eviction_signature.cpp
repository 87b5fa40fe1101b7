#include "tensorrt/eviction_signature.h"

#include <algorithm>

#include "tensorrt/shapes.h"

namespace rotexport {
namespace {

// In the order of eviction::Cache.
constexpr InputFacts kCacheFacts[eviction::kCacheTensors] = {
    {"sink_key", Elements::kActivation, 4},   {"sink_value", Elements::kActivation, 4},
    {"window_key", Elements::kActivation, 4}, {"window_value", Elements::kActivation, 4},
    {"window_position", Elements::kInt32, 3}, {"window_score", Elements::kFloat, 3},
};

std::vector<int64_t> shape_of_cached(int32_t i, const eviction::Problem& p) {
  std::vector<int64_t> shape = {p.batch, p.kv_heads, i < 2 ? std::max<int64_t>(p.sinks, 1) : p.window};
  if (kCacheFacts[i].rank == 4) shape.push_back(i % 2 ? p.value_size : p.head_size);
  return shape;
}

}  // namespace

InputFacts EvictionSignature::facts(int32_t i) const {
  if (i < kCallInputs) return kCallFacts[i];
  InputFacts found = kCacheFacts[i - kCallInputs];
  if (i + 1 == count() && policy_ == eviction::Policy::kSnap) found.name = "window_observed";
  return found;
}

nvinfer1::DataType EvictionSignature::type(int32_t i, nvinfer1::DataType activation) const {
  return type_of(facts(i).elements, activation, activation);
}

void EvictionSignature::read_shapes(const std::vector<nvinfer1::Dims>& shapes,
                                    eviction::Problem& problem) const {
  for (int32_t i = 0; i < count(); ++i) require_rank(i, shapes[i].nbDims);
  problem.batch = shapes[kQueryInput].d[0];
  problem.tokens = shapes[kQueryInput].d[2];
  for (int32_t i = 0; i < count(); ++i) {
    require_shape(facts(i), shapes[i],
                  i < kCallInputs ? shape_of(static_cast<CallInput>(i), problem)
                                  : shape_of_cached(i - kCallInputs, problem));
  }
}

eviction::Operands EvictionSignature::operands(const void* const* inputs, void* const* outputs) const {
  eviction::Operands operands{};
  set_call(operands, inputs, outputs[0]);
  auto** cache = reinterpret_cast<void**>(&operands.cache);
  auto** present = reinterpret_cast<void**>(&operands.present);
  for (int32_t i = 0; i < cached(); ++i) {
    cache[i] = const_cast<void*>(inputs[kCallInputs + i]);  // written only where it is the output, too
    present[i] = outputs[1 + i];
    require_aligned(cache[i], kCacheFacts[i].name);
    require_aligned(present[i], kCacheFacts[i].name);
  }
  return operands;
}

}  // namespace rotexport
