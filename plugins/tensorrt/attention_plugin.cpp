#include "tensorrt/attention_plugin.h"

namespace rotexport {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using Input = AttentionInput;

constexpr const char* kNumberNames[] = {"sinks",    "window",    "recent",    "query_heads",
                                        "kv_heads", "head_size", "value_size"};
constexpr const char* kFactorNames[] = {"scale", "softcap"};
constexpr int kRecentNumber = 2;
constexpr int kValueSizeNumber = 6;

sink_window_attention::Type type_of(DataType type) {
  if (type == DataType::kHALF) return sink_window_attention::Type::kHalf;
  if (type == DataType::kBF16) return sink_window_attention::Type::kBFloat16;
  throw PluginError{"input 'query' must be float16 or bfloat16"};
}

// Calls use(number of the field, name).
template <class Use>
void for_each_number(bool recent, const Use& use) {
  for (int32_t i = 0; i < 7; ++i) {
    if (i != kRecentNumber || recent) use(i, kNumberNames[i]);
  }
}

}  // namespace

template <int kForm>
std::vector<nvinfer1::PluginField> AttentionPlugin<kForm>::fields() {
  std::vector<nvinfer1::PluginField> known;
  for_each_number(attention_form(kForm).recent, [&](int32_t, const char* name) {
    known.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
  });
  for (const char* name : kFactorNames) {
    known.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1);
  }
  return known;
}

template <int kForm>
std::vector<nvinfer1::PluginField> AttentionPlugin<kForm>::own_fields() const {
  std::vector<nvinfer1::PluginField> own = fields();
  size_t next = 0;
  for_each_number(signature_.form().recent, [&](int32_t i, const char*) { own[next++].data = &numbers_[i]; });
  for (const float& factor : factors_) own[next++].data = &factor;
  return own;
}

template <int kForm>
AttentionPlugin<kForm>::AttentionPlugin(const FieldReader& fields) {
  const bool recent = signature_.form().recent;
  this->timing_id_ = operator_name();
  for_each_number(recent, [&](int32_t i, const char* name) {
    numbers_[i] = fields.read_int(name);
    this->timing_id_ += " " + std::to_string(numbers_[i]);
  });
  for (size_t i = 0; i < factors_.size(); ++i) factors_[i] = fields.read_float(kFactorNames[i]);
  this->timing_id_ += factors_[1] > 0 ? " capped" : "";
  if (recent && numbers_[kRecentNumber] < 1) {
    throw PluginError{"field 'recent' is " + std::to_string(numbers_[kRecentNumber]) + ", must be positive"};
  }
}

template <int kForm>
int32_t AttentionPlugin<kForm>::getAliasedInput(int32_t output) noexcept {
  return output > 0 && output < getNbOutputs() ? signature_.first_cached() + output - 1 : -1;
}

template <int kForm>
int32_t AttentionPlugin<kForm>::getOutputDataTypes(DataType* outputs, int32_t output_count,
                                                   const DataType* inputs,
                                                   int32_t input_count) const noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    this->require_counts(input_count, output_count);
    outputs[0] = inputs[signature_.index(Input::kQuery)];
    type_of(outputs[0]);
    for (int32_t i = 1; i < output_count; ++i) {
      outputs[i] = signature_.type(signature_.first_cached() + i - 1, outputs[0]);
    }
  });
}

template <int kForm>
int32_t AttentionPlugin<kForm>::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                                                const nvinfer1::DimsExprs*, int32_t,
                                                nvinfer1::DimsExprs* outputs, int32_t output_count,
                                                nvinfer1::IExprBuilder& builder) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    this->require_counts(input_count, output_count);
    for (int32_t i = 0; i < input_count; ++i) signature_.require_rank(i, inputs[i].nbDims);
    outputs[0] = inputs[signature_.index(Input::kQuery)];
    outputs[0].d[3] = builder.constant(numbers_[kValueSizeNumber]);
    for (int32_t i = 1; i < output_count; ++i) outputs[i] = inputs[signature_.first_cached() + i - 1];
  });
}

template <int kForm>
bool AttentionPlugin<kForm>::supportsFormatCombination(int32_t position,
                                                       const DynamicPluginTensorDesc* descriptions,
                                                       int32_t input_count, int32_t output_count) noexcept {
  if (input_count != signature_.count() || output_count != getNbOutputs()) return false;
  if (position < 0 || position >= input_count + output_count) return false;
  const nvinfer1::PluginTensorDesc& asked = descriptions[position].desc;
  if (asked.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const int32_t query = signature_.index(Input::kQuery);
  if (position == query) return asked.type == DataType::kHALF || asked.type == DataType::kBF16;
  const DataType activation = position < query ? DataType::kHALF : descriptions[query].desc.type;
  if (position == input_count) return asked.type == activation;
  const int32_t input =
      position < input_count ? position : signature_.first_cached() + position - input_count - 1;
  return asked.type == signature_.type(input, activation);
}

template <int kForm>
sink_window_attention::Plan AttentionPlugin<kForm>::plan_for(const PluginInputs& inputs) const {
  sink_window_attention::Problem problem{};
  problem.type = type_of(inputs.types[signature_.index(Input::kQuery)]);
  problem.format = signature_.form().format;
  problem.rotated = signature_.form().rotated;
  problem.sinks = numbers_[0];
  problem.window = numbers_[1];
  problem.recent = numbers_[kRecentNumber];
  problem.query_heads = numbers_[3];
  problem.kv_heads = numbers_[4];
  problem.head_size = numbers_[5];
  problem.value_size = numbers_[kValueSizeNumber];
  problem.scale = factors_[0];
  problem.softcap = factors_[1];
  signature_.read_shapes(inputs.shapes, problem);
  sink_window_attention::Plan plan;
  this->require(make_plan(problem, sink_window_attention::has_warpgroups(), plan));
  return plan;
}

// Calls of few tokens need other workspace than those of many, so the largest call may not be the one that
// needs most.
template <int kForm>
size_t AttentionPlugin<kForm>::workspace_for(const sink_window_attention::Plan& plan) const {
  return sink_window_attention::largest_workspace(plan.problem);
}

template <int kForm>
void AttentionPlugin<kForm>::run(const sink_window_attention::Plan& plan, const void* const* inputs,
                                 void* const* outputs, void* workspace, cudaStream_t stream) const {
  sink_window_attention::Operands operands = signature_.operands(inputs, outputs);
  operands.workspace = workspace;
  this->require(sink_window_attention::run(plan, operands, stream));
}

void add_attention_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators) {
  Creators<AttentionPlugin, std::make_integer_sequence<int, kAttentionForms>>::add_to(creators);
}

}  // namespace rotexport
