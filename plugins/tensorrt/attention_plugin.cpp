#include "tensorrt/attention_plugin.h"

#include <cstdint>

#include "tensorrt/attention_signature.h"

namespace rotexport {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using sink_window_attention::Format;

constexpr const char* kNumberNames[] = {"sinks",    "window",    "recent",    "query_heads",
                                        "kv_heads", "head_size", "value_size"};
constexpr const char* kFactorNames[] = {"scale", "softcap"};
constexpr int kRecentNumber = 2;

sink_window_attention::Type type_of(DataType type) {
  if (type == DataType::kHALF) return sink_window_attention::Type::kHalf;
  if (type == DataType::kBF16) return sink_window_attention::Type::kBFloat16;
  throw PluginError{"input 'query' must be float16 or bfloat16"};
}

// The one type of a kind of elements; activations have that of the queries.
DataType fixed_type(ElementKind kind, DataType activation) {
  switch (kind) {
    case ElementKind::kCodes:
      return DataType::kINT8;
    case ElementKind::kInt64:
      return DataType::kINT64;
    case ElementKind::kInt32:
      return DataType::kINT32;
    case ElementKind::kFloat:
      return DataType::kFLOAT;
    default:
      return activation;
  }
}

// Calls use(kind, number of its field, name).
template <class Use>
void for_each_number(bool recent, const Use& use) {
  for (int32_t i = 0; i < 7; ++i) {
    if (i != kRecentNumber || recent) use(i, kNumberNames[i]);
  }
}

// Cache tensors in the order of their inputs, as the members of a Cache.
std::vector<void**> members(sink_window_attention::Cache& cache, Format format, bool recent) {
  std::vector<void**> found = {&cache.sink_key, &cache.sink_value, &cache.window_key, &cache.window_value};
  if (format != Format::kFloat) {
    found.push_back(&cache.window_key_scale);
    found.push_back(&cache.window_value_scale);
  }
  if (recent) {
    found.push_back(&cache.recent_key);
    found.push_back(&cache.recent_value);
  }
  return found;
}

void require_aligned(const void* address, const char* name) {
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
  throw PluginError{std::string("'") + name + "' must be aligned to 16 bytes"};
}

}  // namespace

template <Format kFormat, bool kRecent>
const char* AttentionPlugin<kFormat, kRecent>::operator_name() {
  switch (kFormat) {
    case Format::kInt8:
      return kRecent ? "SinkWindowAttentionInt8Recent" : "SinkWindowAttentionInt8";
    case Format::kInt4:
      return kRecent ? "SinkWindowAttentionInt4Recent" : "SinkWindowAttentionInt4";
    case Format::kInt2:
      return kRecent ? "SinkWindowAttentionInt2Recent" : "SinkWindowAttentionInt2";
    default:
      return "SinkWindowAttention";
  }
}

template <Format kFormat, bool kRecent>
std::vector<nvinfer1::PluginField> AttentionPlugin<kFormat, kRecent>::fields() {
  std::vector<nvinfer1::PluginField> known;
  for_each_number(kRecent, [&](int32_t, const char* name) {
    known.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kINT32, 1);
  });
  for (const char* name : kFactorNames) {
    known.emplace_back(name, nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1);
  }
  return known;
}

template <Format kFormat, bool kRecent>
AttentionPlugin<kFormat, kRecent>::AttentionPlugin(const FieldReader& fields) {
  timing_id_ = operator_name();
  for_each_number(kRecent, [&](int32_t i, const char* name) {
    numbers_[i] = fields.read_int(name);
    timing_id_ += " " + std::to_string(numbers_[i]);
  });
  for (size_t i = 0; i < factors_.size(); ++i) factors_[i] = fields.read_float(kFactorNames[i]);
  timing_id_ += factors_[1] > 0 ? " capped" : "";
  if (kRecent && numbers_[kRecentNumber] < 1) {
    throw PluginError{"field 'recent' is " + std::to_string(numbers_[kRecentNumber]) + ", must be positive"};
  }
  refer_to_own_fields();
}

template <Format kFormat, bool kRecent>
AttentionPlugin<kFormat, kRecent>::AttentionPlugin(const AttentionPlugin& other)
    : Plugin<AttentionPlugin<kFormat, kRecent>>(other),
      numbers_(other.numbers_),
      factors_(other.factors_),
      timing_id_(other.timing_id_) {
  refer_to_own_fields();
}

template <Format kFormat, bool kRecent>
void AttentionPlugin<kFormat, kRecent>::refer_to_own_fields() {
  serialized_fields_ = fields();
  size_t next = 0;
  for_each_number(kRecent, [&](int32_t i, const char*) { serialized_fields_[next++].data = &numbers_[i]; });
  for (float& factor : factors_) serialized_fields_[next++].data = &factor;
  serialized_ = {static_cast<int32_t>(serialized_fields_.size()), serialized_fields_.data()};
}

template <Format kFormat, bool kRecent>
int32_t AttentionPlugin<kFormat, kRecent>::getNbOutputs() const noexcept {
  return 5 + (kFormat == Format::kFloat ? 0 : 2) + (kRecent ? 2 : 0);
}

template <Format kFormat, bool kRecent>
int32_t AttentionPlugin<kFormat, kRecent>::getAliasedInput(int32_t output) noexcept {
  return output > 0 && output < getNbOutputs() ? kCacheInputs + output - 1 : -1;
}

template <Format kFormat, bool kRecent>
int32_t AttentionPlugin<kFormat, kRecent>::getOutputDataTypes(DataType* outputs, int32_t output_count,
                                                              const DataType* inputs,
                                                              int32_t input_count) const noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    const auto signature = attention_inputs(kFormat, kRecent);
    if (input_count != static_cast<int32_t>(signature.size()) || output_count != getNbOutputs()) {
      throw PluginError{std::to_string(input_count) + " inputs and " + std::to_string(output_count) +
                        " outputs, must be " + std::to_string(signature.size()) + " and " +
                        std::to_string(getNbOutputs())};
    }
    type_of(inputs[kQuery]);
    outputs[0] = inputs[kQuery];
    for (int32_t i = 1; i < output_count; ++i) {
      outputs[i] = fixed_type(signature[kCacheInputs + i - 1].kind, inputs[kQuery]);
    }
  });
}

template <Format kFormat, bool kRecent>
int32_t AttentionPlugin<kFormat, kRecent>::getOutputShapes(const nvinfer1::DimsExprs* inputs,
                                                           int32_t input_count, const nvinfer1::DimsExprs*,
                                                           int32_t, nvinfer1::DimsExprs* outputs,
                                                           int32_t output_count,
                                                           nvinfer1::IExprBuilder& builder) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    const auto signature = attention_inputs(kFormat, kRecent);
    if (input_count != static_cast<int32_t>(signature.size()) || output_count != getNbOutputs()) {
      throw PluginError{std::to_string(input_count) + " inputs, must be " + std::to_string(signature.size())};
    }
    for (int32_t i = 0; i < input_count; ++i) {
      if (inputs[i].nbDims == signature[i].rank) continue;
      throw PluginError{std::string("input '") + signature[i].name + "' has " +
                        std::to_string(inputs[i].nbDims) + " axes, must have " +
                        std::to_string(signature[i].rank)};
    }
    outputs[0] = inputs[kQuery];
    outputs[0].d[3] = builder.constant(numbers_[6]);
    for (int32_t i = 1; i < output_count; ++i) outputs[i] = inputs[kCacheInputs + i - 1];
  });
}

template <Format kFormat, bool kRecent>
bool AttentionPlugin<kFormat, kRecent>::supportsFormatCombination(int32_t position,
                                                                  const DynamicPluginTensorDesc* descriptions,
                                                                  int32_t input_count,
                                                                  int32_t output_count) noexcept {
  const auto signature = attention_inputs(kFormat, kRecent);
  if (input_count != static_cast<int32_t>(signature.size()) || output_count != getNbOutputs()) return false;
  if (position < 0 || position >= input_count + output_count) return false;
  const nvinfer1::PluginTensorDesc& asked = descriptions[position].desc;
  if (asked.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position == kQuery) return asked.type == DataType::kHALF || asked.type == DataType::kBF16;
  const DataType activation = position < kQuery ? DataType::kHALF : descriptions[kQuery].desc.type;
  if (position == input_count) return asked.type == activation;
  const int32_t input = position < input_count ? position : kCacheInputs + position - input_count - 1;
  return asked.type == fixed_type(signature[input].kind, activation);
}

template <Format kFormat, bool kRecent>
sink_window_attention::Plan AttentionPlugin<kFormat, kRecent>::plan_for(const nvinfer1::Dims* shapes,
                                                                        DataType type,
                                                                        int32_t input_count) const {
  const auto signature = attention_inputs(kFormat, kRecent);
  if (input_count != static_cast<int32_t>(signature.size())) {
    throw PluginError{std::to_string(input_count) + " inputs, must be " + std::to_string(signature.size())};
  }
  sink_window_attention::Problem problem{};
  problem.type = type_of(type);
  problem.format = kFormat;
  problem.sinks = numbers_[0];
  problem.window = numbers_[1];
  problem.recent = numbers_[kRecentNumber];
  problem.query_heads = numbers_[3];
  problem.kv_heads = numbers_[4];
  problem.head_size = numbers_[5];
  problem.value_size = numbers_[6];
  problem.scale = factors_[0];
  problem.softcap = factors_[1];
  read_shapes(shapes, signature, problem);
  sink_window_attention::Plan plan;
  const Status planned = sink_window_attention::make_plan(problem, sink_window_attention::has_warpgroups(), plan);
  if (!planned) throw PluginError{planned.message};
  return plan;
}

template <Format kFormat, bool kRecent>
sink_window_attention::Plan AttentionPlugin<kFormat, kRecent>::plan_for_extreme(
    const DynamicPluginTensorDesc* inputs, int32_t input_count,
    nvinfer1::Dims DynamicPluginTensorDesc::* extreme) const {
  std::vector<nvinfer1::Dims> shapes;
  for (int32_t i = 0; i < input_count; ++i) shapes.push_back(inputs[i].*extreme);
  if (input_count <= kQuery) throw PluginError{"input 'query' is missing"};
  return plan_for(shapes.data(), inputs[kQuery].desc.type, input_count);
}

template <Format kFormat, bool kRecent>
int32_t AttentionPlugin<kFormat, kRecent>::configurePlugin(const DynamicPluginTensorDesc* inputs,
                                                           int32_t input_count,
                                                           const DynamicPluginTensorDesc*, int32_t) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    plan_for_extreme(inputs, input_count, &DynamicPluginTensorDesc::min);
    plan_for_extreme(inputs, input_count, &DynamicPluginTensorDesc::max);
  });
}

// Calls of few tokens need other workspace than those of many, so the largest call may not be the one that
// needs most.
template <Format kFormat, bool kRecent>
size_t AttentionPlugin<kFormat, kRecent>::getWorkspaceSize(const DynamicPluginTensorDesc* inputs,
                                                           int32_t input_count,
                                                           const DynamicPluginTensorDesc*,
                                                           int32_t) const noexcept {
  size_t bytes = 0;
  this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    const auto plan = plan_for_extreme(inputs, input_count, &DynamicPluginTensorDesc::max);
    bytes = sink_window_attention::largest_workspace(plan.problem);
  });
  return bytes;
}

template <Format kFormat, bool kRecent>
int32_t AttentionPlugin<kFormat, kRecent>::onShapeChange(const nvinfer1::PluginTensorDesc* inputs,
                                                         int32_t input_count,
                                                         const nvinfer1::PluginTensorDesc*,
                                                         int32_t) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
    std::vector<nvinfer1::Dims> shapes;
    for (int32_t i = 0; i < input_count; ++i) shapes.push_back(inputs[i].dims);
    if (input_count <= kQuery) throw PluginError{"input 'query' is missing"};
    plan_for(shapes.data(), inputs[kQuery].type, input_count);
  });
}

template <Format kFormat, bool kRecent>
int32_t AttentionPlugin<kFormat, kRecent>::enqueue(const nvinfer1::PluginTensorDesc* inputs,
                                                   const nvinfer1::PluginTensorDesc*,
                                                   const void* const* input_data, void* const* output_data,
                                                   void* workspace, cudaStream_t stream) noexcept {
  return this->guarded(nvinfer1::ErrorCode::kFAILED_EXECUTION, [&] {
    const auto signature = attention_inputs(kFormat, kRecent);
    std::vector<nvinfer1::Dims> shapes;
    for (size_t i = 0; i < signature.size(); ++i) {
      shapes.push_back(inputs[i].dims);
      require_aligned(input_data[i], signature[i].name);
    }
    const auto plan = plan_for(shapes.data(), inputs[kQuery].type, static_cast<int32_t>(signature.size()));
    sink_window_attention::Operands operands{};
    operands.query = input_data[kQuery];
    operands.query_sink = input_data[kQuerySink];
    operands.key = input_data[kKey];
    operands.value = input_data[kValue];
    operands.past_length = static_cast<const int32_t*>(input_data[kPastLength]);
    operands.new_length = static_cast<const int32_t*>(input_data[kNewLength]);
    operands.decay = static_cast<const float*>(input_data[kDecay]);
    operands.output = output_data[0];
    operands.workspace = workspace;
    const std::vector<void**> cache = members(operands.cache, kFormat, kRecent);
    const std::vector<void**> present = members(operands.present, kFormat, kRecent);
    for (size_t i = 0; i < cache.size(); ++i) {
      *cache[i] =
          const_cast<void*>(input_data[kCacheInputs + i]);  // written only where it is the output, too
      *present[i] = output_data[1 + i];
      require_aligned(*present[i], signature[kCacheInputs + i].name);
    }
    require_aligned(operands.output, "output");
    const Status done = sink_window_attention::run(plan, operands, stream);
    if (!done) throw PluginError{done.message};
  });
}

namespace {

struct AttentionCreators {
  Creator<AttentionPlugin<Format::kFloat, false>> plain;
  Creator<AttentionPlugin<Format::kInt8, false>> int8;
  Creator<AttentionPlugin<Format::kInt4, false>> int4;
  Creator<AttentionPlugin<Format::kInt2, false>> int2;
  Creator<AttentionPlugin<Format::kInt8, true>> int8_recent;
  Creator<AttentionPlugin<Format::kInt4, true>> int4_recent;
  Creator<AttentionPlugin<Format::kInt2, true>> int2_recent;
};

}  // namespace

void add_attention_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators) {
  static AttentionCreators all;
  creators.insert(creators.end(), {&all.plain, &all.int8, &all.int4, &all.int2, &all.int8_recent,
                                   &all.int4_recent, &all.int2_recent});
}

}  // namespace rotexport
