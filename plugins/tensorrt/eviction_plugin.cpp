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

template <Policy kPolicy>
const char* EvictionPlugin<kPolicy>::operator_name() {
  return kPolicy == Policy::kSnap ? "SnapAttention" : "HeavyHitterAttention";
}

template <Policy kPolicy>
std::vector<nvinfer1::PluginField> EvictionPlugin<kPolicy>::fields() {
  std::vector<nvinfer1::PluginField> known;
  for (const char* name : number_names(kPolicy)) {
    known.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
  }
  for (const char* name : factor_names(kPolicy)) {
    known.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1);
  }
  return known;
}

template <Policy kPolicy>
EvictionPlugin<kPolicy>::EvictionPlugin(const FieldReader& fields) {
  timing_id_ = operator_name();
  for (const char* name : number_names(kPolicy)) {
    numbers_.push_back(fields.read_int(name));
    timing_id_ += " " + std::to_string(numbers_.back());
  }
  for (const char* name : factor_names(kPolicy)) factors_.push_back(fields.read_float(name));
  timing_id_ += factors_[1] > 0 ? " capped" : "";
  refer_to_own_fields();
}

template <Policy kPolicy>
EvictionPlugin<kPolicy>::EvictionPlugin(const EvictionPlugin& other)
    : Plugin<EvictionPlugin<kPolicy>>(other),
      numbers_(other.numbers_),
      factors_(other.factors_),
      timing_id_(other.timing_id_) {
  refer_to_own_fields();
}

template <Policy kPolicy>
void EvictionPlugin<kPolicy>::refer_to_own_fields() {
  serialized_fields_ = fields();
  size_t next = 0;
  for (int32_t& number : numbers_) serialized_fields_[next++].data = &number;
  for (float& factor : factors_) serialized_fields_[next++].data = &factor;
  serialized_ = {static_cast<int32_t>(serialized_fields_.size()), serialized_fields_.data()};
}

template <Policy kPolicy>
eviction::Problem EvictionPlugin<kPolicy>::problem() const {
  eviction::Problem problem{};
  problem.policy = kPolicy;
  int64_t* const sizes[] = {&problem.sinks,     &problem.window,      &problem.recent,
                            &problem.context,   &problem.query_heads, &problem.kv_heads,
                            &problem.head_size, &problem.value_size,  &problem.observe};
  float* const factors[] = {&problem.scale, &problem.softcap, &problem.forget};
  for (size_t i = 0; i < numbers_.size(); ++i) *sizes[i] = numbers_[i];
  for (size_t i = 0; i < factors_.size(); ++i) *factors[i] = factors_[i];
  return problem;
}

template <Policy kPolicy>
int32_t EvictionPlugin<kPolicy>::getAliasedInput(int32_t output) noexcept {
  return output > 0 && output < getNbOutputs() ? kEvictedCache + output - 1 : -1;
}

template <Policy kPolicy>
void EvictionPlugin<kPolicy>::check_counts(int32_t input_count, int32_t output_count) const {
  constexpr int32_t kInputs = kEvictedCache + eviction::kCacheTensors;
  if (input_count == kInputs && output_count == getNbOutputs()) return;
  throw PluginError{std::to_string(input_count) + " inputs and " + std::to_string(output_count) +
                    " outputs, must be " + std::to_string(kInputs) + " and " +
                    std::to_string(getNbOutputs())};
}

template <Policy kPolicy>
int32_t EvictionPlugin<kPolicy>::getOutputDataTypes(DataType* outputs, int32_t output_count,
                                                    const DataType* inputs,
                                                    int32_t input_count) const noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    check_counts(input_count, output_count);
    type_of(inputs[kEvictedQuery]);
    outputs[0] = inputs[kEvictedQuery];
    const auto signature = eviction_inputs(problem());
    for (int32_t i = 1; i < output_count; ++i) {
      const EvictionTensor& tensor = signature[kEvictedCache + i - 1];
      outputs[i] = tensor.is_activation ? inputs[kEvictedQuery] : tensor.type;
    }
  });
}

template <Policy kPolicy>
int32_t EvictionPlugin<kPolicy>::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                                                 const nvinfer1::DimsExprs*, int32_t,
                                                 nvinfer1::DimsExprs* outputs, int32_t output_count,
                                                 nvinfer1::IExprBuilder& builder) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    check_counts(input_count, output_count);
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

template <Policy kPolicy>
bool EvictionPlugin<kPolicy>::supportsFormatCombination(int32_t position,
                                                        const DynamicPluginTensorDesc* descriptions,
                                                        int32_t input_count, int32_t output_count) noexcept {
  const auto signature = eviction_inputs(problem());
  if (input_count != static_cast<int32_t>(signature.size()) || output_count != getNbOutputs()) return false;
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

template <Policy kPolicy>
eviction::Plan EvictionPlugin<kPolicy>::plan_for(const std::vector<nvinfer1::Dims>& shapes,
                                                 DataType type) const {
  eviction::Problem asked = problem();
  asked.type = type_of(type);
  read_shapes(shapes, asked);
  eviction::Plan plan;
  const Status planned = eviction::make_plan(asked, plan);
  if (!planned) throw PluginError{planned.message};
  return plan;
}

template <Policy kPolicy>
eviction::Plan EvictionPlugin<kPolicy>::plan_for_extreme(
    const DynamicPluginTensorDesc* inputs, int32_t input_count,
    nvinfer1::Dims DynamicPluginTensorDesc::* extreme) const {
  check_counts(input_count, getNbOutputs());
  std::vector<nvinfer1::Dims> shapes;
  for (int32_t i = 0; i < input_count; ++i) shapes.push_back(inputs[i].*extreme);
  return plan_for(shapes, inputs[kEvictedQuery].desc.type);
}

template <Policy kPolicy>
int32_t EvictionPlugin<kPolicy>::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                                 const DynamicPluginTensorDesc*, int32_t) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    plan_for_extreme(inputs, input_count, &DynamicPluginTensorDesc::min);
    plan_for_extreme(inputs, input_count, &DynamicPluginTensorDesc::max);
  });
}

// Calls of few tokens are split into more parts, so the largest call may not be the one that needs most.
template <Policy kPolicy>
size_t EvictionPlugin<kPolicy>::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t input_count,
                                                 const DynamicPluginTensorDesc*, int32_t) const noexcept {
  size_t bytes = 0;
  this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    const auto plan = plan_for_extreme(inputs, input_count, &DynamicPluginTensorDesc::max);
    bytes = eviction::largest_workspace(plan.problem);
  });
  return bytes;
}

template <Policy kPolicy>
int32_t EvictionPlugin<kPolicy>::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                                               const nvinfer1::PluginTensorDesc*, int32_t) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    check_counts(input_count, getNbOutputs());
    std::vector<nvinfer1::Dims> shapes;
    for (int32_t i = 0; i < input_count; ++i) shapes.push_back(inputs[i].dims);
    plan_for(shapes, inputs[kEvictedQuery].type);
  });
}

template <Policy kPolicy>
int32_t EvictionPlugin<kPolicy>::enqueue(const nvinfer1::PluginTensorDesc* inputs,
                                         const nvinfer1::PluginTensorDesc*, const void* const* input_data,
                                         void* const* output_data, void* workspace,
                                         cudaStream_t stream) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kFAILED_EXECUTION, [&] {
    const auto signature = eviction_inputs(problem());
    std::vector<nvinfer1::Dims> shapes;
    for (size_t i = 0; i < signature.size(); ++i) {
      shapes.push_back(inputs[i].dims);
      require_aligned(input_data[i], signature[i].name);
    }
    eviction::Operands operands{};
    operands.query = input_data[kEvictedQuery];
    operands.query_sink = input_data[kEvictedQuerySink];
    operands.key = input_data[kEvictedKey];
    operands.value = input_data[kEvictedValue];
    operands.past_length = static_cast<const int32_t*>(input_data[kEvictedPastLength]);
    operands.new_length = static_cast<const int32_t*>(input_data[kEvictedNewLength]);
    operands.decay = static_cast<const float*>(input_data[kEvictedDecay]);
    operands.output = output_data[0];
    operands.workspace = workspace;
    auto** cache = reinterpret_cast<void**>(&operands.cache);
    auto** present = reinterpret_cast<void**>(&operands.present);
    for (int32_t i = 0; i < eviction::kCacheTensors; ++i) {
      cache[i] =
          const_cast<void*>(input_data[kEvictedCache + i]);  // written only where it is the output, too
      present[i] = output_data[1 + i];
      require_aligned(present[i], signature[kEvictedCache + i].name);
    }
    require_aligned(operands.output, "output");
    const Status done = eviction::run(plan_for(shapes, inputs[kEvictedQuery].type), operands, stream);
    if (!done) throw PluginError{done.message};
  });
}

void add_eviction_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators) {
  static Creator<EvictionPlugin<Policy::kHeavyHitter>> heavy_hitter;
  static Creator<EvictionPlugin<Policy::kSnap>> snap;
  creators.insert(creators.end(), {&heavy_hitter, &snap});
}

}  // namespace rotexport
