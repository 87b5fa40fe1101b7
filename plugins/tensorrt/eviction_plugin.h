// HeavyHitterAttention and SnapAttention as TensorRT plugins; graphs/ defines them.
#pragma once

#include "tensorrt/cached_plugin.h"
#include "tensorrt/eviction_signature.h"

namespace rotexport {

template <int kPolicy>
class EvictionPlugin : public CachedPlugin<EvictionPlugin<kPolicy>> {
 public:
  static const char* operator_name();
  static std::vector<nvinfer1::PluginField> fields();

  explicit EvictionPlugin(const FieldReader& fields);
  const char* name() const { return operator_name(); }

  const EvictionSignature& signature() const { return signature_; }
  int64_t value_size() const { return problem().value_size; }
  std::vector<nvinfer1::PluginField> own_fields() const;
  eviction::Plan plan_for(const PluginInputs& inputs) const;
  size_t workspace_for(const eviction::Plan& plan) const;
  void run(const eviction::Plan& plan, const void* const* inputs, void* const* outputs, void* workspace,
           cudaStream_t stream) const;

 private:
  // The problem of the attributes, without the sizes that shapes say.
  eviction::Problem problem() const;

  EvictionSignature signature_{eviction::Policy{kPolicy}};
  std::vector<int32_t> numbers_;  // in the order of the fields
  std::vector<float> factors_;
};

// Adds the creators of both operators.
void add_eviction_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators);

}  // namespace rotexport
