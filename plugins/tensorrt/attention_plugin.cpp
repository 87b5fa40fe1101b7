#include "tensorrt/attention_plugin.h"

namespace rotexport {
namespace {

constexpr const char* kNumberNames[] = {"sinks",    "window",    "recent",    "query_heads",
                                        "kv_heads", "head_size", "value_size"};
constexpr const char* kFactorNames[] = {"scale", "softcap"};
constexpr int kRecentNumber = 2;
constexpr int kValueSizeNumber = 6;

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
int64_t AttentionPlugin<kForm>::value_size() const {
  return numbers_[kValueSizeNumber];
}

template <int kForm>
sink_window_attention::Plan AttentionPlugin<kForm>::plan_for(const PluginInputs& inputs) const {
  sink_window_attention::Problem problem{};
  problem.type = kernel_type(inputs.types[kQueryInput]);
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
