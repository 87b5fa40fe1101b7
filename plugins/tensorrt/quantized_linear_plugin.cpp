#include "tensorrt/quantized_linear_plugin.h"

namespace rotexport {

using nvinfer1::DataType;

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
  this->timing_id_ = std::string(operator_name()) + " 1 " + std::to_string(fields_.group) + " " +
                     std::to_string(fields_.out_type);
}

template <int kForm>
std::vector<nvinfer1::PluginField> QuantizedLinearPlugin<kForm>::own_fields() const {
  std::vector<nvinfer1::PluginField> own = fields();
  own[0].data = &fields_.group;
  own[1].data = &fields_.out_type;
  return own;
}

template <int kForm>
void QuantizedLinearPlugin<kForm>::output_types(const DataType* inputs, DataType* outputs) const {
  for (int32_t i = 0; i < input_count(); ++i) {
    if (inputs[i] == signature_.type(i, out_type_)) continue;
    throw PluginError{"input " + std::to_string(i) + " is of type " +
                      std::to_string(static_cast<int32_t>(inputs[i])) + ", must be " +
                      std::to_string(static_cast<int32_t>(signature_.type(i, out_type_)))};
  }
  outputs[0] = out_type_;
}

template <int kForm>
void QuantizedLinearPlugin<kForm>::output_shapes(const nvinfer1::DimsExprs* inputs,
                                                 nvinfer1::DimsExprs* outputs,
                                                 nvinfer1::IExprBuilder& builder) const {
  int64_t columns = 0;
  signature_.check(inputs, fields_, columns);
  outputs[0] = inputs[0];
  outputs[0].d[outputs[0].nbDims - 1] = builder.constant(columns);
}

template <int kForm>
bool QuantizedLinearPlugin<kForm>::takes(int32_t position,
                                         const nvinfer1::DynamicPluginTensorDesc* tensors) const {
  const DataType wanted = position == input_count() ? out_type_ : signature_.type(position, out_type_);
  return tensors[position].desc.type == wanted;
}

template <int kForm>
quantized_linear::Plan QuantizedLinearPlugin<kForm>::plan_for(const PluginInputs& inputs) const {
  quantized_linear::Plan plan;
  this->require(make_plan(signature_.problem(inputs.shapes.data(), fields_),
                          quantized_linear::multiprocessors(), plan));
  return plan;
}

template <int kForm>
size_t QuantizedLinearPlugin<kForm>::workspace_for(const quantized_linear::Plan& plan) const {
  return largest_workspace(plan.problem, quantized_linear::multiprocessors());
}

template <int kForm>
void QuantizedLinearPlugin<kForm>::run(const quantized_linear::Plan& plan, const void* const* inputs,
                                       void* const* outputs, void* workspace, cudaStream_t stream) const {
  this->require(quantized_linear::run(plan, signature_.operands(inputs, outputs[0], workspace), stream));
}

void add_linear_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators) {
  Creators<QuantizedLinearPlugin, std::make_integer_sequence<int, kLinearForms>>::add_to(creators);
}

}  // namespace rotexport
