// HeavyHitterAttention and SnapAttention as TensorRT plugins; graphs/ defines them. Cache outputs are bound
// to the buffers of the cache inputs where TensorRT aliases them.
#pragma once

#include "kernels/eviction.h"
#include "tensorrt/plugin.h"

namespace rotexport {

template <eviction::Policy kPolicy>
class EvictionPlugin : public Plugin<EvictionPlugin<kPolicy>> {
 public:
  static const char* operator_name();
  static std::vector<nvinfer1::PluginField> fields();

  explicit EvictionPlugin(const FieldReader& fields);
  EvictionPlugin(const EvictionPlugin& other);
  const char* name() const { return operator_name(); }

  int32_t getNbOutputs() const noexcept override { return 1 + eviction::kCacheTensors; }
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
  void refer_to_own_fields();
  // The problem of the attributes, without the sizes that shapes say.
  eviction::Problem problem() const;
  eviction::Plan plan_for(const std::vector<nvinfer1::Dims>& shapes, nvinfer1::DataType type) const;
  eviction::Plan plan_for_extreme(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                                  nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* extreme) const;
  void check_counts(int32_t input_count, int32_t output_count) const;

  std::vector<int32_t> numbers_;  // in the order of the fields
  std::vector<float> factors_;
  std::string timing_id_;
  std::vector<nvinfer1::PluginField> serialized_fields_;
  nvinfer1::PluginFieldCollection serialized_;
};

// Adds the creators of both operators.
void add_eviction_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators);

}  // namespace rotexport
