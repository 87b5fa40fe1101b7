#include "tensorrt/quantized_linear_signature.h"

#include "tensorrt/shapes.h"

namespace rotexport {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using quantized_linear::Ending;
using quantized_linear::Format;

constexpr Format k88 = Format::kW8A8;
constexpr Format k48 = Format::kW4A8;
constexpr Format k44 = Format::kW4A4;

constexpr LinearForm kForms[kLinearForms] = {
    {"QuantizedLinearW8A8", k88, false, false, Ending::kNone},
    {"QuantizedLinearW8A8Residual", k88, false, false, Ending::kResidual},
    {"QuantizedLinearW8A8Gated", k88, false, false, Ending::kGate},
    {"QuantizedLinearW8A8Asymmetric", k88, false, true, Ending::kNone},
    {"QuantizedLinearW4A8", k48, false, false, Ending::kNone},
    {"QuantizedLinearW4A8Residual", k48, false, false, Ending::kResidual},
    {"QuantizedLinearW4A8Gated", k48, false, false, Ending::kGate},
    {"QuantizedLinearW4A8Asymmetric", k48, false, true, Ending::kNone},
    {"QuantizedLinearW4A8TwoLevel", k48, true, false, Ending::kNone},
    {"QuantizedLinearW4A8TwoLevelResidual", k48, true, false, Ending::kResidual},
    {"QuantizedLinearW4A8TwoLevelGated", k48, true, false, Ending::kGate},
    {"QuantizedLinearW4A4", k44, false, false, Ending::kNone},
    {"QuantizedLinearW4A4Residual", k44, false, false, Ending::kResidual},
    {"QuantizedLinearW4A4Gated", k44, false, false, Ending::kGate},
    {"QuantizedLinearW4A4Asymmetric", k44, false, true, Ending::kNone},
    {"QuantizedLinearW4A4TwoLevel", k44, true, false, Ending::kNone},
    {"QuantizedLinearW4A4TwoLevelResidual", k44, true, false, Ending::kResidual},
    {"QuantizedLinearW4A4TwoLevelGated", k44, true, false, Ending::kGate},
};

bool equal(const Dims& a, const Dims& b) {
  if (a.nbDims != b.nbDims) return false;
  for (int32_t i = 0; i < a.nbDims; ++i) {
    if (a.d[i] != b.d[i]) return false;
  }
  return true;
}

Dims with_last(Dims shape, int64_t last) {
  shape.d[shape.nbDims - 1] = last;
  return shape;
}

int64_t per_byte(bool four_bits) { return four_bits ? 2 : 1; }

quantized_linear::Type kernel_type(DataType type) {
  switch (type) {
    case DataType::kHALF:
      return quantized_linear::Type::kHalf;
    case DataType::kBF16:
      return quantized_linear::Type::kBFloat16;
    default:
      return quantized_linear::Type::kFloat;
  }
}

}  // namespace

const LinearForm& linear_form(int index) { return kForms[index]; }

DataType data_type_of(int32_t onnx_type) {
  switch (onnx_type) {
    case 1:
      return DataType::kFLOAT;
    case 10:
      return DataType::kHALF;
    case 16:
      return DataType::kBF16;
    default:
      throw PluginError{"field 'out_type' is " + std::to_string(onnx_type) +
                        ", must be 1 (float32), 10 (float16) or 16 (bfloat16)"};
  }
}

LinearSignature::LinearSignature(int form) : form_(kForms[form]), inputs_{Role::kX, Role::kXScale} {
  if (form_.asymmetric) inputs_.push_back(Role::kXZero);
  inputs_.push_back(Role::kWeight);
  if (form_.two_level) inputs_.push_back(Role::kFactors);
  inputs_.push_back(Role::kWeightScale);
  if (form_.asymmetric) inputs_.push_back(Role::kWeightSum);
  inputs_.push_back(Role::kBias);
  if (form_.ending != Ending::kNone) inputs_.push_back(Role::kOther);
}

DataType LinearSignature::type(int32_t i, DataType out) const {
  switch (inputs_[i]) {
    case Role::kX:
    case Role::kWeight:
    case Role::kFactors:
      return DataType::kINT8;
    case Role::kOther:
      return out;
    default:
      return DataType::kFLOAT;
  }
}

int32_t LinearSignature::index(Role role) const {
  for (int32_t i = 0; i < count(); ++i) {
    if (inputs_[i] == role) return i;
  }
  return -1;
}

bool LinearSignature::by_row(Role role) {
  return role == Role::kX || role == Role::kXScale || role == Role::kXZero || role == Role::kOther;
}

std::string LinearSignature::described(Role role, const Dims& shape) const {
  constexpr const char* kNames[] = {"x",       "x_scale",      "x_zero",     "weight",
                                    "factors", "weight_scale", "weight_sum", "bias"};
  const char* other = form_.ending == Ending::kResidual ? "residual" : "gate";
  const char* name = role == Role::kOther ? other : kNames[static_cast<int>(role)];
  return std::string("input '") + name + "' has shape " + text(shape);
}

void LinearSignature::require(Role role, const Dims* shapes, const Dims& wanted) const {
  const int32_t i = index(role);
  if (i < 0 || equal(shapes[i], wanted)) return;
  throw PluginError{described(role, shapes[i]) + ", must be " + text(wanted)};
}

quantized_linear::Problem LinearSignature::problem(const Dims* shapes, const LinearFields& fields) const {
  const Dims& x = shapes[index(Role::kX)];
  const Dims& x_scale = shapes[index(Role::kXScale)];
  const Dims& weight = shapes[index(Role::kWeight)];
  if (x.nbDims < 1) throw PluginError{"input 'x' is a scalar, must have an axis to multiply along"};
  if (x_scale.nbDims < 1) throw PluginError{"input 'x_scale' is a scalar, must be one number a row"};
  if (weight.nbDims != 2) throw PluginError{described(Role::kWeight, weight) + ", must have two axes"};
  quantized_linear::Problem problem{};
  problem.format = form_.format;
  problem.type = kernel_type(data_type_of(fields.out_type));
  problem.ending = form_.ending;
  problem.rows = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) problem.rows *= x.d[i];
  problem.inputs = x.d[x.nbDims - 1] * per_byte(form_.format == Format::kW4A4);
  problem.outputs = weight.d[0];
  problem.group = fields.group;
  const int64_t length = weight.d[1] * per_byte(form_.format != Format::kW8A8);
  if (length % fields.group != 0) {
    throw PluginError{described(Role::kWeight, weight) + ": rows of " + std::to_string(length) +
                      " are no multiple of the group of " + std::to_string(fields.group)};
  }
  problem.groups = length / fields.group;
  problem.row_scales = x_scale.d[x_scale.nbDims - 1];
  problem.two_level = form_.two_level;
  problem.asymmetric = form_.asymmetric;
  const Dims columns{1, {problem.outputs}};
  require(Role::kXScale, shapes, with_last(x, problem.row_scales));
  require(Role::kXZero, shapes, with_last(x, 1));
  require(Role::kFactors, shapes, Dims{2, {problem.groups, problem.outputs}});
  require(Role::kWeightScale, shapes, Dims{2, {form_.two_level ? 1 : problem.groups, problem.outputs}});
  require(Role::kWeightSum, shapes, columns);
  require(Role::kBias, shapes, columns);
  require(Role::kOther, shapes, with_last(x, problem.outputs));
  return problem;
}

bool LinearSignature::check(const nvinfer1::DimsExprs* inputs, const LinearFields& fields,
                            int64_t& outputs) const {
  std::vector<Dims> shapes(inputs_.size());
  bool known = true;
  for (int32_t i = 0; i < count(); ++i) {
    const nvinfer1::DimsExprs& from = inputs[i];
    const bool rows = by_row(inputs_[i]);
    shapes[i].nbDims = from.nbDims;
    for (int32_t j = 0; j < from.nbDims; ++j) {
      const bool leading = rows && j + 1 < from.nbDims;
      if (!leading && !from.d[j]->isConstant()) {
        if (!rows) throw PluginError{"only the activations may have dynamic dimensions"};
        known = false;
      }
      shapes[i].d[j] = leading || !from.d[j]->isConstant() ? 1 : from.d[j]->getConstantValue();
    }
  }
  const Dims& weight = shapes[index(Role::kWeight)];
  if (weight.nbDims != 2) throw PluginError{described(Role::kWeight, weight) + ", must have two axes"};
  outputs = weight.d[0];
  if (!known) return false;
  quantized_linear::Plan plan;
  const Status planned = make_plan(problem(shapes.data(), fields), 1, plan);
  if (!planned) throw PluginError{planned.message};
  return true;
}

quantized_linear::Operands LinearSignature::operands(const void* const* inputs, void* y,
                                                     void* workspace) const {
  const auto at = [&](Role role) { return index(role) < 0 ? nullptr : inputs[index(role)]; };
  require_aligned(at(Role::kX), "x");
  require_aligned(at(Role::kWeight), "weight");
  quantized_linear::Operands operands{};
  operands.x = static_cast<const int8_t*>(at(Role::kX));
  operands.x_scale = static_cast<const float*>(at(Role::kXScale));
  operands.x_zero = static_cast<const float*>(at(Role::kXZero));
  operands.weight = static_cast<const int8_t*>(at(Role::kWeight));
  operands.factors = static_cast<const int8_t*>(at(Role::kFactors));
  operands.weight_scale = static_cast<const float*>(at(Role::kWeightScale));
  operands.weight_sum = static_cast<const float*>(at(Role::kWeightSum));
  operands.bias = static_cast<const float*>(at(Role::kBias));
  operands.other = at(Role::kOther);
  operands.y = y;
  operands.workspace = workspace;
  return operands;
}

}  // namespace rotexport
