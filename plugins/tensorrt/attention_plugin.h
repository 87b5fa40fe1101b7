// SinkWindowAttention and its quantized forms as TensorRT plugins. Cache outputs are bound to the buffers of
// the cache inputs where TensorRT aliases them.
#pragma once

#include <array>

#include "tensorrt/attention_signature.h"
#include "tensorrt/planned_plugin.h"

namespace rotexport {

template <int kForm>
class AttentionPlugin : public PlannedPlugin<AttentionPlugin<kForm>> {
 public:
  static const char* operator_name() { return attention_form(kForm).name; }
  static std::vector<nvinfer1::PluginField> fields();

  explicit AttentionPlugin(const FieldReader& fields);
  const char* name() const { return operator_name(); }

  int32_t getNbOutputs() const noexcept override { return 1 + signature_.cached(); }
  int32_t getAliasedInput(int32_t output) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* descriptions,
                                 int32_t input_count, int32_t output_count) noexcept override;

  std::vector<nvinfer1::PluginField> own_fields() const;
  int32_t input_count() const { return signature_.count(); }
  sink_window_attention::Plan plan_for(const PluginInputs& inputs) const;
  size_t workspace_for(const sink_window_attention::Plan& plan) const;
  void run(const sink_window_attention::Plan& plan, const void* const* inputs, void* const* outputs,
           void* workspace, cudaStream_t stream) const;

 private:
  AttentionSignature signature_{kForm};
  std::array<int32_t, 7> numbers_{};  // in the order of the fields
  std::array<float, 2> factors_{};    // scale, softcap
};

// Adds the creators of all operators.
void add_attention_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators);

}  // namespace rotexport
