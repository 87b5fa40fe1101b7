// Attention operators that update a cache, as plugins: output 0 is of the queries' type and shape but for the
// size of values, the others are the cache's inputs, to whose buffers they are bound where TensorRT aliases
// them. Besides what planned_plugin.h asks for, one says:
//
//   const Signature& signature() const;   see attention_signature.h, eviction_signature.h
//   int64_t value_size() const;
#pragma once

#include "tensorrt/call_signature.h"
#include "tensorrt/planned_plugin.h"

namespace rotexport {

template <class Derived>
class CachedPlugin : public PlannedPlugin<Derived> {
 public:
  int32_t getNbOutputs() const noexcept override { return 1 + self().signature().cached(); }
  int32_t getAliasedInput(int32_t output) noexcept override {
    return output > 0 && output < getNbOutputs() ? input_of(output) : -1;
  }

  int32_t input_count() const { return self().signature().count(); }

  void output_types(const nvinfer1::DataType* inputs, nvinfer1::DataType* outputs) const {
    const nvinfer1::DataType activation = inputs[kQueryInput];
    kernel_type(activation);
    outputs[0] = activation;
    for (int32_t i = 1; i < getNbOutputs(); ++i)
      outputs[i] = self().signature().type(input_of(i), activation);
  }

  void output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& builder) const {
    for (int32_t i = 0; i < input_count(); ++i) self().signature().require_rank(i, inputs[i].nbDims);
    outputs[0] = inputs[kQueryInput];
    outputs[0].d[3] = builder.constant(self().value_size());
    for (int32_t i = 1; i < getNbOutputs(); ++i) outputs[i] = inputs[input_of(i)];
  }

  bool takes(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors) const {
    const nvinfer1::DataType type = tensors[position].desc.type;
    if (position == kQueryInput) {
      return type == nvinfer1::DataType::kHALF || type == nvinfer1::DataType::kBF16;
    }
    // What comes before the queries is no activation.
    const nvinfer1::DataType activation =
        position < kQueryInput ? nvinfer1::DataType::kHALF : tensors[kQueryInput].desc.type;
    const int32_t output = position - input_count();
    if (output == 0) return type == activation;
    return type == self().signature().type(output < 0 ? position : input_of(output), activation);
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }

  // The cache's input that an output updates.
  int32_t input_of(int32_t output) const { return self().signature().first_cached() + output - 1; }
};

}  // namespace rotexport
