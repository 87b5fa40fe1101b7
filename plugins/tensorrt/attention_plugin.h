// SinkWindowAttention and its quantized forms as TensorRT plugins; graphs/SinkWindowAttention*.onnxtxt define
// them. Cache outputs are bound to the buffers of the cache inputs where TensorRT aliases them.
#pragma once

#include <array>

#include "kernels/attention.h"
#include "tensorrt/plugin.h"

namespace rotexport {

// What an operator's name says of the window.
struct WindowKind {
  sink_window_attention::Format format;
  bool recent;  // its newest tokens in floating point, too
};

template <sink_window_attention::Format kFormat, bool kRecent>
class AttentionPlugin : public Plugin<AttentionPlugin<kFormat, kRecent>> {
 public:
  static const char* operator_name();
  static std::vector<nvinfer1::PluginField> fields();

  explicit AttentionPlugin(const FieldReader& fields);
  AttentionPlugin(const AttentionPlugin& other);
  const char* name() const { return operator_name(); }

  int32_t getNbOutputs() const noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* descriptions,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override;
  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc*, int32_t) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                  const void* const* input_data, void* const* output_data, void* workspace,
                  cudaStream_t stream) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &serialized_; }

 private:
  static constexpr WindowKind kKind = {kFormat, kRecent};
  static constexpr int32_t kNumbers = kRecent ? 7 : 6;

  void refer_to_own_fields();
  sink_window_attention::Plan plan_for(const nvinfer1::Dims* shapes, nvinfer1::DataType type,
                                       int32_t input_count) const;
  sink_window_attention::Plan plan_for_extreme(
      const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
      nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* extreme) const;

  std::array<int32_t, 7> numbers_{};  // in the order of the fields
  std::array<float, 2> factors_{};    // scale, softcap
  std::string timing_id_;
  std::vector<nvinfer1::PluginField> serialized_fields_;
  nvinfer1::PluginFieldCollection serialized_;
};

// Adds the creators of all operators.
void add_attention_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators);

}  // namespace rotexport
