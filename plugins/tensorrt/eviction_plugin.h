// HeavyHitterAttention and SnapAttention as TensorRT plugins; graphs/ defines them. Cache outputs are bound
// to the buffers of the cache inputs where TensorRT aliases them.
#pragma once

#include "kernels/eviction.h"
#include "tensorrt/planned_plugin.h"

namespace rotexport {

template <int kPolicy>
class EvictionPlugin : public PlannedPlugin<EvictionPlugin<kPolicy>> {
 public:
  static const char* operator_name();
  static std::vector<nvinfer1::PluginField> fields();

  explicit EvictionPlugin(const FieldReader& fields);
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

  std::vector<nvinfer1::PluginField> own_fields() const;
  int32_t input_count() const;
  eviction::Plan plan_for(const PluginInputs& inputs) const;
  size_t workspace_for(const eviction::Plan& plan) const;
  void run(const eviction::Plan& plan, const void* const* inputs, void* const* outputs, void* workspace,
           cudaStream_t stream) const;

 private:
  // The problem of the attributes, without the sizes that shapes say.
  eviction::Problem problem() const;

  std::vector<int32_t> numbers_;  // in the order of the fields
  std::vector<float> factors_;
};

// Adds the creators of both operators.
void add_eviction_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators);

}  // namespace rotexport
