// SinkWindowAttention and its quantized forms as TensorRT plugins.
#pragma once

#include <array>

#include "tensorrt/attention_signature.h"
#include "tensorrt/cached_plugin.h"

namespace rotexport {

template <int kForm>
class AttentionPlugin : public CachedPlugin<AttentionPlugin<kForm>> {
 public:
  static const char* operator_name() { return attention_form(kForm).name; }
  static std::vector<nvinfer1::PluginField> fields();

  explicit AttentionPlugin(const FieldReader& fields);
  const char* name() const { return operator_name(); }

  const AttentionSignature& signature() const { return signature_; }
  int64_t value_size() const;
  std::vector<nvinfer1::PluginField> own_fields() const;
  sink_window_attention::Plan plan_for(const PluginInputs& inputs) const;
  size_t workspace_for(const sink_window_attention::Plan& plan) const;
  void run(const sink_window_attention::Plan& plan, const void* const* inputs, void* const* outputs,
           void* workspace, cudaStream_t stream) const;

 private:
  AttentionSignature signature_{kForm};
  std::array<int32_t, 7> numbers_{};  // in the order of the fields
  std::array<float, 2> factors_{};    // scale, softcap
};

// Adds the creators of all operators.
void add_attention_creators(std::vector<nvinfer1::IPluginCreatorInterface*>& creators);

}  // namespace rotexport
