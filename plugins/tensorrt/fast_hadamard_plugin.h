// FastHadamard, FastHadamardInt8 and FastHadamardInt4 as TensorRT plugins; graphs/FastHadamard*.onnxtxt
// define them.
#pragma once

#include "kernels/fast_hadamard.h"
#include "tensorrt/plugin.h"

namespace rotexport {

template <fast_hadamard::Output kOutput>
class FastHadamardPlugin : public Plugin<FastHadamardPlugin<kOutput>> {
 public:
  static const char* operator_name();
  static std::vector<nvinfer1::PluginField> fields();

  explicit FastHadamardPlugin(const FieldReader& fields);
  FastHadamardPlugin(const FastHadamardPlugin& other);
  const char* name() const { return operator_name(); }

  int32_t getNbOutputs() const noexcept override;
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
  static constexpr bool kQuantizes = kOutput != fast_hadamard::Output::kSame;

  void refer_to_own_fields();
  fast_hadamard::Plan plan_for(const nvinfer1::Dims* shapes, nvinfer1::DataType type,
                               int32_t input_count) const;

  float clip_ = 1.0f;
  std::string timing_id_;
  std::vector<nvinfer1::PluginField> serialized_fields_;
  nvinfer1::PluginFieldCollection serialized_;
};

}  // namespace rotexport
