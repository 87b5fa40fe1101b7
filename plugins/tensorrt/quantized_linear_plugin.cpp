#include "tensorrt/quantized_linear_plugin.h"

#include <tuple>
#include <utility>

namespace rotexport {

using nvinfer1::DataType;
using nvinfer1::Dims;

template <int kForm>
std::vector<nvinfer1::PluginField> QuantizedLinearPlugin<kForm>::fields() {
  return {{"group", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
          {"out_type", nullptr, nvinfer1::PluginFieldType::kINT32, 1}};
}

template <int kForm>
QuantizedLinearPlugin<kForm>::QuantizedLinearPlugin(const FieldReader& fields)
    : fields_{fields.read_int("group"), fields.read_int("out_type")},
      out_type_(data_type_of(fields_.out_type)) {
  if (fields_.group < quantized_linear::kSlice || fields_.group % quantized_linear::kSlice != 0) {
    throw PluginError{"field 'group' is " + std::to_string(fields_.group) + ", must be a multiple of " +
                      std::to_string(quantized_linear::kSlice)};
  }
  timing_id_ = std::string(operator_name()) + " 1 " + std::to_string(fields_.group) + " " +
               std::to_string(fields_.out_type);
  refer_to_own_fields();
}

template <int kForm>
QuantizedLinearPlugin<kForm>::QuantizedLinearPlugin(const QuantizedLinearPlugin& other)
    : Plugin<QuantizedLinearPlugin<kForm>>(other),
      fields_(other.fields_),
      out_type_(other.out_type_),
      timing_id_(other.timing_id_) {
  refer_to_own_fields();
}

template <int kForm>
void QuantizedLinearPlugin<kForm>::refer_to_own_fields() {
  serialized_fields_ = fields();
  serialized_fields_[0].data = &fields_.group;
  serialized_fields_[1].data = &fields_.out_type;
  serialized_ = {static_cast<int32_t>(serialized_fields_.size()), serialized_fields_.data()};
}

template <int kForm>
int32_t QuantizedLinearPlugin<kForm>::getOutputDataTypes(DataType* outputs, int32_t output_count,
                                                         const DataType* inputs,
                                                         int32_t input_count) const noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    signature_.require_count(input_count, output_count);
    for (int32_t i = 0; i < input_count; ++i) {
      if (inputs[i] == signature_.type(i, out_type_)) continue;
      throw PluginError{"input " + std::to_string(i) + " is of type " +
                        std::to_string(static_cast<int32_t>(inputs[i])) + ", must be " +
                        std::to_string(static_cast<int32_t>(signature_.type(i, out_type_)))};
    }
    outputs[0] = out_type_;
  });
}

template <int kForm>
int32_t QuantizedLinearPlugin<kForm>::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                                                      const nvinfer1::DimsExprs*, int32_t,
                                                      nvinfer1::DimsExprs* outputs, int32_t output_count,
                                                      nvinfer1::IExprBuilder& builder) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    signature_.require_count(input_count, output_count);
    int64_t columns = 0;
    signature_.check(inputs, fields_, columns);
    outputs[0] = inputs[0];
    outputs[0].d[outputs[0].nbDims - 1] = builder.constant(columns);
  });
}

template <int kForm>
bool QuantizedLinearPlugin<kForm>::supportsFormatCombination(
    int32_t position, const nvinfer1::DynamicPluginTensorDesc* descriptions, int32_t input_count,
    int32_t output_count) noexcept {
  if (input_count != signature_.count() || output_count != 1) return false;
  if (position < 0 || position > input_count) return false;
  const nvinfer1::PluginTensorDesc& tensor = descriptions[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  return tensor.type == (position == input_count ? out_type_ : signature_.type(position, out_type_));
}

template <int kForm>
template <class ShapeOf>
quantized_linear::Problem QuantizedLinearPlugin<kForm>::problem_of(const ShapeOf& shape_of) const {
  std::vector<Dims> shapes;
  for (int32_t i = 0; i < signature_.count(); ++i) shapes.push_back(shape_of(i));
  return signature_.problem(shapes.data(), fields_);
}

template <int kForm>
quantized_linear::Plan QuantizedLinearPlugin<kForm>::plan_for(
    const quantized_linear::Problem& problem) const {
  quantized_linear::Plan plan;
  const Status planned = make_plan(problem, quantized_linear::multiprocessors(), plan);
  if (!planned) throw PluginError{planned.message};
  return plan;
}

template <int kForm>
int32_t QuantizedLinearPlugin<kForm>::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs,
                                                      int32_t input_count,
                                                      const nvinfer1::DynamicPluginTensorDesc*,
                                                      int32_t output_count) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    signature_.require_count(input_count, output_count);
    plan_for(problem_of([&](int32_t i) { return inputs[i].min; }));
    plan_for(problem_of([&](int32_t i) { return inputs[i].max; }));
  });
}

template <int kForm>
size_t QuantizedLinearPlugin<kForm>::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs,
                                                      int32_t input_count,
                                                      const nvinfer1::DynamicPluginTensorDesc*,
                                                      int32_t output_count) const noexcept {
  size_t bytes = 0;
  this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    signature_.require_count(input_count, output_count);
    const auto problem = problem_of([&](int32_t i) { return inputs[i].max; });
    bytes = largest_workspace(problem, quantized_linear::multiprocessors());
  });
  return bytes;
}

template <int kForm>
int32_t QuantizedLinearPlugin<kForm>::onShapeChange(const nvinfer1::PluginTensorDesc* inputs,
                                                    int32_t input_count, const nvinfer1::PluginTensorDesc*,
                                                    int32_t output_count) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    signature_.require_count(input_count, output_count);
    plan_for(problem_of([&](int32_t i) { return inputs[i].dims; }));
  });
}

template <int kForm>
int32_t QuantizedLinearPlugin<kForm>::enqueue(const nvinfer1::PluginTensorDesc* inputs,
                                              const nvinfer1::PluginTensorDesc*,
                                              const void* const* input_data, void* const* output_data,
                                              void* workspace, cudaStream_t stream) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kFAILED_EXECUTION, [&] {
    const auto plan = plan_for(problem_of([&](int32_t i) { return inputs[i].dims; }));
    const auto operands = signature_.operands(input_data, output_data[0], workspace);
    const Status done = quantized_linear::run(plan, operands, stream);
    if (!done) throw PluginError{done.message};
  });
}

namespace {

template <int... kForms>
void add_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators,
                  std::integer_sequence<int, kForms...>) {
  static std::tuple<Creator<QuantizedLinearPlugin<kForms>>...> made;
  (creators.push_back(&std::get<kForms>(made)), ...);
}

}  // namespace

void add_linear_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators) {
  add_creators(creators, std::make_integer_sequence<int, kLinearForms>());
}

}  // namespace rotexport
