// The QuantizedLinear operators: their names, inputs and shapes; graphs/QuantizedLinear*.onnxtxt define them.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "kernels/quantized_linear.h"

namespace rotexport {

struct LinearForm {
  const char* name;
  quantized_linear::Format format;
  bool two_level;
  bool asymmetric;
  quantized_linear::Ending ending;
};

constexpr int kLinearForms = 18;
const LinearForm& linear_form(int index);

// What a plugin is created with.
struct LinearFields {
  int32_t group;
  int32_t out_type;  // ONNX's number
};

// Reads operands by their place and checks them. Functions throw PluginError.
class LinearSignature {
 public:
  explicit LinearSignature(int form);

  const LinearForm& form() const { return form_; }
  int32_t count() const { return static_cast<int32_t>(inputs_.size()); }

  // The type of input i; `out` is that of the result.
  nvinfer1::DataType type(int32_t i, nvinfer1::DataType out) const;

  // Checks every shape and returns the problem they state.
  quantized_linear::Problem problem(const nvinfer1::Dims* shapes, const LinearFields& fields) const;

  // The same with rows counted as one: what is known before there are profiles. False where even the last
  // dimension of an activation is dynamic; the outputs are in `outputs` in any case.
  bool check(const nvinfer1::DimsExprs* inputs, const LinearFields& fields, int64_t& outputs) const;

  quantized_linear::Operands operands(const void* const* inputs, void* y, void* workspace) const;

 private:
  enum class Role { kX, kXScale, kXZero, kWeight, kFactors, kWeightScale, kWeightSum, kBias, kOther };

  int32_t index(Role role) const;  // -1 where the form has no such input
  std::string described(Role role, const nvinfer1::Dims& shape) const;
  void require(Role role, const nvinfer1::Dims* shapes, const nvinfer1::Dims& wanted) const;
  static bool by_row(Role role);

  const LinearForm& form_;
  std::vector<Role> inputs_;
};

// The type of the number that ONNX gives it: float32, float16 or bfloat16.
nvinfer1::DataType data_type_of(int32_t onnx_type);

}  // namespace rotexport
