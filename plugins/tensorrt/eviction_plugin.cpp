#include "tensorrt/eviction_plugin.h"

namespace rotexport {
namespace {

using eviction::Policy;

// Attributes; the policy's own comes last.
std::vector<const char*> number_names(Policy policy) {
  std::vector<const char*> names = {"sinks",       "window",   "recent",    "context",
                                    "query_heads", "kv_heads", "head_size", "value_size"};
  if (policy == Policy::kSnap) names.push_back("observe");
  return names;
}
std::vector<const char*> factor_names(Policy policy) {
  std::vector<const char*> names = {"scale", "softcap"};
  if (policy == Policy::kHeavyHitter) names.push_back("forget");
  return names;
}

}  // namespace

template <int kPolicy>
const char* EvictionPlugin<kPolicy>::operator_name() {
  return Policy{kPolicy} == Policy::kSnap ? "SnapAttention" : "HeavyHitterAttention";
}

template <int kPolicy>
std::vector<nvinfer1::PluginField> EvictionPlugin<kPolicy>::fields() {
  std::vector<nvinfer1::PluginField> known;
  for (const char* name : number_names(Policy{kPolicy})) {
    known.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
  }
  for (const char* name : factor_names(Policy{kPolicy})) {
    known.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1);
  }
  return known;
}

template <int kPolicy>
EvictionPlugin<kPolicy>::EvictionPlugin(const FieldReader& fields) {
  this->timing_id_ = operator_name();
  for (const char* name : number_names(Policy{kPolicy})) {
    numbers_.push_back(fields.read_int(name));
    this->timing_id_ += " " + std::to_string(numbers_.back());
  }
  for (const char* name : factor_names(Policy{kPolicy})) factors_.push_back(fields.read_float(name));
  this->timing_id_ += factors_[1] > 0 ? " capped" : "";
}

template <int kPolicy>
std::vector<nvinfer1::PluginField> EvictionPlugin<kPolicy>::own_fields() const {
  std::vector<nvinfer1::PluginField> own = fields();
  size_t next = 0;
  for (const int32_t& number : numbers_) own[next++].data = &number;
  for (const float& factor : factors_) own[next++].data = &factor;
  return own;
}

template <int kPolicy>
eviction::Problem EvictionPlugin<kPolicy>::problem() const {
  eviction::Problem problem{};
  problem.policy = Policy{kPolicy};
  int64_t* const sizes[] = {&problem.sinks,     &problem.window,      &problem.recent,
                            &problem.context,   &problem.query_heads, &problem.kv_heads,
                            &problem.head_size, &problem.value_size,  &problem.observe};
  float* const factors[] = {&problem.scale, &problem.softcap, &problem.forget};
  for (size_t i = 0; i < numbers_.size(); ++i) *sizes[i] = numbers_[i];
  for (size_t i = 0; i < factors_.size(); ++i) *factors[i] = factors_[i];
  return problem;
}

template <int kPolicy>
eviction::Plan EvictionPlugin<kPolicy>::plan_for(const PluginInputs& inputs) const {
  eviction::Problem asked = problem();
  asked.type = kernel_type(inputs.types[kQueryInput]);
  signature_.read_shapes(inputs.shapes, asked);
  eviction::Plan plan;
  this->require(eviction::make_plan(asked, plan));
  return plan;
}

// Calls of few tokens are split into more parts, so the largest call may not be the one that needs most.
template <int kPolicy>
size_t EvictionPlugin<kPolicy>::workspace_for(const eviction::Plan& plan) const {
  return eviction::largest_workspace(plan.problem);
}

template <int kPolicy>
void EvictionPlugin<kPolicy>::run(const eviction::Plan& plan, const void* const* inputs, void* const* outputs,
                                  void* workspace, cudaStream_t stream) const {
  eviction::Operands operands = signature_.operands(inputs, outputs);
  operands.workspace = workspace;
  this->require(eviction::run(plan, operands, stream));
}

void add_eviction_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators) {
  Creators<EvictionPlugin, std::make_integer_sequence<int, 2>>::add_to(creators);
}

}  // namespace rotexport
