#include "tensorrt/eviction_plugin.h"

#include <cstdint>

#include "tensorrt/eviction_signature.h"

namespace rotexport {
namespace {

using eviction::Policy;
using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;

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

eviction::Type type_of(DataType type) {
  if (type == DataType::kHALF) return eviction::Type::kHalf;
  if (type == DataType::kBF16) return eviction::Type::kBFloat16;
  throw PluginError{"input 'query' must be float16 or bfloat16"};
}

void require_aligned(const void* address, const char* name) {
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
  throw PluginError{std::string("'") + name + "' must be aligned to 16 bytes"};
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
int32_t EvictionPlugin<kPolicy>::input_count() const {
  return kEvictedCache + eviction::kCacheTensors;
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
int32_t EvictionPlugin<kPolicy>::getAliasedInput(int32_t output) noexcept {
  return output > 0 && output < getNbOutputs() ? kEvictedCache + output - 1 : -1;
}

template <int kPolicy>
int32_t EvictionPlugin<kPolicy>::getOutputDataTypes(DataType* outputs, int32_t output_count,
                                                    const DataType* inputs,
                                                    int32_t input_count) const noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    this->require_counts(input_count, output_count);
    type_of(inputs[kEvictedQuery]);
    outputs[0] = inputs[kEvictedQuery];
    const auto signature = eviction_inputs(problem());
    for (int32_t i = 1; i < output_count; ++i) {
      const EvictionTensor& tensor = signature[kEvictedCache + i - 1];
      outputs[i] = tensor.is_activation ? inputs[kEvictedQuery] : tensor.type;
    }
  });
}

template <int kPolicy>
int32_t EvictionPlugin<kPolicy>::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                                                 const nvinfer1::DimsExprs*, int32_t,
                                                 nvinfer1::DimsExprs* outputs, int32_t output_count,
                                                 nvinfer1::IExprBuilder& builder) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    this->require_counts(input_count, output_count);
    const auto signature = eviction_inputs(problem());
    for (int32_t i = 0; i < input_count; ++i) {
      const auto rank = static_cast<int32_t>(signature[i].shape.size());
      if (inputs[i].nbDims == rank) continue;
      throw PluginError{std::string("input '") + signature[i].name + "' has " +
                        std::to_string(inputs[i].nbDims) + " axes, must have " + std::to_string(rank)};
    }
    outputs[0] = inputs[kEvictedQuery];
    outputs[0].d[3] = builder.constant(static_cast<int64_t>(problem().value_size));
    for (int32_t i = 1; i < output_count; ++i) outputs[i] = inputs[kEvictedCache + i - 1];
  });
}

template <int kPolicy>
bool EvictionPlugin<kPolicy>::supportsFormatCombination(int32_t position,
                                                        const DynamicPluginTensorDesc* descriptions,
                                                        int32_t input_count, int32_t output_count) noexcept {
  const auto signature = eviction_inputs(problem());
  if (input_count != this->input_count() || output_count != getNbOutputs()) return false;
  if (position < 0 || position >= input_count + output_count) return false;
  const nvinfer1::PluginTensorDesc& asked = descriptions[position].desc;
  if (asked.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position == kEvictedQuery) return asked.type == DataType::kHALF || asked.type == DataType::kBF16;
  int32_t input = position;
  if (position == input_count) input = kEvictedQuery;
  if (position > input_count) input = kEvictedCache + position - input_count - 1;
  if (!signature[input].is_activation) return asked.type == signature[input].type;
  return asked.type == descriptions[kEvictedQuery].desc.type;
}

template <int kPolicy>
eviction::Plan EvictionPlugin<kPolicy>::plan_for(const PluginInputs& inputs) const {
  eviction::Problem asked = problem();
  asked.type = type_of(inputs.types[kEvictedQuery]);
  read_shapes(inputs.shapes, asked);
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
  const auto signature = eviction_inputs(problem());
  for (size_t i = 0; i < signature.size(); ++i) require_aligned(inputs[i], signature[i].name);
  eviction::Operands operands{};
  operands.query = inputs[kEvictedQuery];
  operands.query_sink = inputs[kEvictedQuerySink];
  operands.key = inputs[kEvictedKey];
  operands.value = inputs[kEvictedValue];
  operands.past_length = static_cast<const int32_t*>(inputs[kEvictedPastLength]);
  operands.new_length = static_cast<const int32_t*>(inputs[kEvictedNewLength]);
  operands.decay = static_cast<const float*>(inputs[kEvictedDecay]);
  operands.output = outputs[0];
  operands.workspace = workspace;
  auto** cache = reinterpret_cast<void**>(&operands.cache);
  auto** present = reinterpret_cast<void**>(&operands.present);
  for (int32_t i = 0; i < eviction::kCacheTensors; ++i) {
    cache[i] = const_cast<void*>(inputs[kEvictedCache + i]);  // written only where it is the output, too
    present[i] = outputs[1 + i];
    require_aligned(present[i], signature[kEvictedCache + i].name);
  }
  require_aligned(operands.output, "output");
  this->require(eviction::run(plan, operands, stream));
}

void add_eviction_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators) {
  Creators<EvictionPlugin, std::make_integer_sequence<int, 2>>::add_to(creators);
}

}  // namespace rotexport
