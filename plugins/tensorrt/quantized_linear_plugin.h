// The QuantizedLinear operators as TensorRT plugins.
#pragma once

#include "tensorrt/planned_plugin.h"
#include "tensorrt/quantized_linear_signature.h"

namespace rotexport {

template <int kForm>
class QuantizedLinearPlugin : public PlannedPlugin<QuantizedLinearPlugin<kForm>> {
 public:
  static const char* operator_name() { return linear_form(kForm).name; }
  static std::vector<nvinfer1::PluginField> fields();

  explicit QuantizedLinearPlugin(const FieldReader& fields);
  const char* name() const { return operator_name(); }

  int32_t getNbOutputs() const noexcept override { return 1; }
  void output_types(const nvinfer1::DataType* inputs, nvinfer1::DataType* outputs) const;
  void output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& builder) const;
  bool takes(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors) const;
  std::vector<nvinfer1::PluginField> own_fields() const;
  int32_t input_count() const { return signature_.count(); }
  quantized_linear::Plan plan_for(const PluginInputs& inputs) const;
  size_t workspace_for(const quantized_linear::Plan& plan) const;
  void run(const quantized_linear::Plan& plan, const void* const* inputs, void* const* outputs,
           void* workspace, cudaStream_t stream) const;

 private:
  LinearSignature signature_{kForm};
  LinearFields fields_;
  nvinfer1::DataType out_type_;
};

// Adds a creator for every operator to `creators`.
void add_linear_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators);

}  // namespace rotexport
