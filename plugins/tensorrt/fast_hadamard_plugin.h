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
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* descriptions,
                                 int32_t input_count, int32_t output_count) noexcept override;

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
