#include "tensorrt/fast_hadamard_plugin.h"

#include "tensorrt/shapes.h"

namespace rotexport {
namespace {

using fast_hadamard::Output;
using nvinfer1::DataType;

enum Input : int32_t { kX, kSigns, kBase, kHigh, kLow, kInputs };

int64_t order_of_square(const nvinfer1::Dims& shape, const char* name) {
  if (shape.nbDims != 2 || shape.d[0] != shape.d[1] || shape.d[0] < 1) {
    throw PluginError{std::string("input '") + name + "' has shape " + text(shape) +
                      ", must be a square matrix"};
  }
  return shape.d[0];
}

fast_hadamard::Type type_of(DataType type) {
  switch (type) {
    case DataType::kHALF:
      return fast_hadamard::Type::kHalf;
    case DataType::kBF16:
      return fast_hadamard::Type::kBFloat16;
    case DataType::kFLOAT:
      return fast_hadamard::Type::kFloat;
    default:
      throw PluginError{"input 'x' must be float16, bfloat16 or float32"};
  }
}

}  // namespace

template <Output kOutput>
const char* FastHadamardPlugin<kOutput>::operator_name() {
  switch (kOutput) {
    case Output::kInt8:
      return "FastHadamardInt8";
    case Output::kInt4:
      return "FastHadamardInt4";
    default:
      return "FastHadamard";
  }
}

template <Output kOutput>
std::vector<nvinfer1::PluginField> FastHadamardPlugin<kOutput>::fields() {
  if (!kQuantizes) return {};
  return {{"clip", nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1}};
}

template <Output kOutput>
FastHadamardPlugin<kOutput>::FastHadamardPlugin(const FieldReader& fields) {
  if (kQuantizes) {
    clip_ = fields.read_float("clip");
    if (!(clip_ > 0 && clip_ <= 1)) {
      throw PluginError{"field 'clip' is " + std::to_string(clip_) + ", must lie in (0, 1]"};
    }
  }
  this->timing_id_ = std::string(operator_name()) + " 1";  // the clip changes values, not times
}

template <Output kOutput>
std::vector<nvinfer1::PluginField> FastHadamardPlugin<kOutput>::own_fields() const {
  std::vector<nvinfer1::PluginField> own = fields();
  for (nvinfer1::PluginField& field : own) field.data = &clip_;
  return own;
}

template <Output kOutput>
int32_t FastHadamardPlugin<kOutput>::input_count() const {
  return kInputs;
}

template <Output kOutput>
int32_t FastHadamardPlugin<kOutput>::getNbOutputs() const noexcept {
  return kQuantizes ? 2 : 1;
}

template <Output kOutput>
void FastHadamardPlugin<kOutput>::output_types(const DataType* inputs, DataType* outputs) const {
  type_of(inputs[kX]);
  outputs[0] = kQuantizes ? DataType::kINT8 : inputs[kX];
  if (kQuantizes) outputs[1] = DataType::kFLOAT;
}

template <Output kOutput>
void FastHadamardPlugin<kOutput>::output_shapes(const nvinfer1::DimsExprs* inputs,
                                                nvinfer1::DimsExprs* outputs,
                                                nvinfer1::IExprBuilder& builder) const {
  const nvinfer1::DimsExprs& x = inputs[kX];
  if (x.nbDims < 1) throw PluginError{"input 'x' is a scalar, must have an axis to transform"};
  const int32_t last = x.nbDims - 1;
  if (x.d[last]->isConstant()) {  // what can be checked before any profile is known
    PluginInputs known{std::vector<nvinfer1::Dims>(kInputs), std::vector<DataType>(kInputs, DataType::kHALF)};
    known.shapes[kX] = {1, {x.d[last]->getConstantValue()}};
    for (int32_t i = kSigns; i < kInputs; ++i) {
      known.shapes[i].nbDims = inputs[i].nbDims;
      for (int32_t j = 0; j < inputs[i].nbDims; ++j) {
        if (!inputs[i].d[j]->isConstant()) throw PluginError{"only x may have dynamic dimensions"};
        known.shapes[i].d[j] = inputs[i].d[j]->getConstantValue();
      }
    }
    plan_for(known);
  }
  outputs[0] = x;
  if (kOutput == Output::kInt4) {
    outputs[0].d[last] =
        builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *x.d[last], *builder.constant(2));
  }
  if (kQuantizes) {
    outputs[1] = x;
    outputs[1].d[last] = builder.constant(1);
  }
}

template <Output kOutput>
bool FastHadamardPlugin<kOutput>::takes(int32_t position,
                                        const nvinfer1::DynamicPluginTensorDesc* tensors) const {
  const DataType type = tensors[position].desc.type;
  switch (position) {
    case kX:
      return type == DataType::kHALF || type == DataType::kBF16 || type == DataType::kFLOAT;
    case kSigns:
      return type == tensors[kX].desc.type;
    case kBase:
    case kHigh:
    case kLow:
      return type == DataType::kINT8;
    case kInputs:
      return type == (kQuantizes ? DataType::kINT8 : tensors[kX].desc.type);
    default:
      return type == DataType::kFLOAT;
  }
}

template <Output kOutput>
fast_hadamard::Plan FastHadamardPlugin<kOutput>::plan_for(const PluginInputs& inputs) const {
  const std::vector<nvinfer1::Dims>& shapes = inputs.shapes;
  const nvinfer1::Dims& x = shapes[kX];
  if (x.nbDims < 1) throw PluginError{"input 'x' is a scalar, must have an axis to transform"};
  fast_hadamard::Problem problem{};
  problem.type = type_of(inputs.types[kX]);
  problem.output = kOutput;
  problem.clip = clip_;
  problem.row = x.d[x.nbDims - 1];
  problem.rows = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) problem.rows *= x.d[i];
  if (shapes[kSigns].nbDims != 1 || shapes[kSigns].d[0] != problem.row) {
    throw PluginError{"input 'signs' has shape " + text(shapes[kSigns]) + ", must be [" +
                      std::to_string(problem.row) + "] as the last axis of x"};
  }
  problem.base_order = order_of_square(shapes[kBase], "base");
  problem.sylvester_order = order_of_square(shapes[kHigh], "hi") * order_of_square(shapes[kLow], "lo");
  fast_hadamard::Plan plan;
  this->require(fast_hadamard::make_plan(problem, plan));
  return plan;
}

template <Output kOutput>
void FastHadamardPlugin<kOutput>::run(const fast_hadamard::Plan& plan, const void* const* inputs,
                                      void* const* outputs, void* workspace, cudaStream_t stream) const {
  require_aligned(inputs[kX], "x");
  require_aligned(inputs[kSigns], "signs");
  require_aligned(outputs[0], "output");
  fast_hadamard::Operands operands{};
  operands.x = inputs[kX];
  operands.signs = inputs[kSigns];
  operands.base = static_cast<const int8_t*>(inputs[kBase]);
  operands.y = outputs[0];
  operands.scale = kQuantizes ? static_cast<float*>(outputs[1]) : nullptr;
  operands.workspace = workspace;
  this->require(fast_hadamard::run(plan, operands, stream));
}

template class FastHadamardPlugin<Output::kSame>;
template class FastHadamardPlugin<Output::kInt8>;
template class FastHadamardPlugin<Output::kInt4>;

}  // namespace rotexport
