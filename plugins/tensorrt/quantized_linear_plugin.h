// The QuantizedLinear operators as TensorRT plugins.
#pragma once

#include "tensorrt/plugin.h"
#include "tensorrt/quantized_linear_signature.h"

namespace rotexport {

template <int kForm>
class QuantizedLinearPlugin : public Plugin<QuantizedLinearPlugin<kForm>> {
 public:
  static const char* operator_name() { return linear_form(kForm).name; }
  static std::vector<nvinfer1::PluginField> fields();

  explicit QuantizedLinearPlugin(const FieldReader& fields);
  QuantizedLinearPlugin(const QuantizedLinearPlugin& other);
  const char* name() const { return operator_name(); }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* descriptions,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t output_count) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t output_count) const noexcept override;
  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc*, int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                  const void* const* input_data, void* const* output_data, void* workspace,
                  cudaStream_t stream) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &serialized_; }

 private:
  void refer_to_own_fields();
  template <class ShapeOf>
  quantized_linear::Problem problem_of(const ShapeOf& shape_of) const;
  quantized_linear::Plan plan_for(const quantized_linear::Problem& problem) const;

  LinearSignature signature_{kForm};
  LinearFields fields_;
  nvinfer1::DataType out_type_;
  std::string timing_id_;
  std::vector<nvinfer1::PluginField> serialized_fields_;
  nvinfer1::PluginFieldCollection serialized_;
};

// Adds a creator for every operator to `creators`.
void add_linear_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators);

}  // namespace rotexport
