// FastHadamard, FastHadamardInt8 and FastHadamardInt4 as TensorRT plugins; graphs/FastHadamard*.onnxtxt
// define them.
#pragma once

#include "kernels/fast_hadamard.h"
#include "tensorrt/planned_plugin.h"

namespace rotexport {

template <fast_hadamard::Output kOutput>
class FastHadamardPlugin : public PlannedPlugin<FastHadamardPlugin<kOutput>> {
 public:
  static const char* operator_name();
  static std::vector<nvinfer1::PluginField> fields();

  explicit FastHadamardPlugin(const FieldReader& fields);
  const char* name() const { return operator_name(); }

  int32_t getNbOutputs() const noexcept override;
  void output_types(const nvinfer1::DataType* inputs, nvinfer1::DataType* outputs) const;
  void output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& builder) const;
  bool takes(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors) const;
  std::vector<nvinfer1::PluginField> own_fields() const;
  int32_t input_count() const;
  fast_hadamard::Plan plan_for(const PluginInputs& inputs) const;
  size_t workspace_for(const fast_hadamard::Plan& plan) const { return plan.workspace_bytes; }
  void run(const fast_hadamard::Plan& plan, const void* const* inputs, void* const* outputs, void* workspace,
           cudaStream_t stream) const;

 private:
  static constexpr bool kQuantizes = kOutput != fast_hadamard::Output::kSame;

  float clip_ = 1.0f;
};

}  // namespace rotexport
