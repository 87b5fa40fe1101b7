// The sink/window operators: their names, inputs and shapes; graphs/SinkWindowAttention*.onnxtxt define them.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "kernels/attention.h"
#include "tensorrt/call_signature.h"

namespace rotexport {

// What an operator's name says.
struct AttentionForm {
  const char* name;
  sink_window_attention::Format format;  // of the window
  bool centered;                         // keys are stored minus a mean
  bool recent;                           // the newest tokens are kept in floating point, too
  bool rotated;                          // queries and keys come before their rotation
};

constexpr int kAttentionForms = 26;
const AttentionForm& attention_form(int index);

// Inputs of all operators, in their order: first those of CallInput. A form has some of the others; those of
// the cache come in pairs.
enum class AttentionInput {
  kPositions,
  kQuery,
  kQuerySink,
  kKey,
  kValue,
  kPastLength,
  kNewLength,
  kDecay,
  kKeyMean,
  kMeanQuery,
  kMeanAngles,
  kSinkKey,
  kSinkValue,
  kWindowKey,
  kWindowValue,
  kWindowKeyScale,
  kWindowValueScale,
  kRecentKey,
  kRecentValue,
  kSigns,
  kBase,
  kHigh,
  kLow
};

// Reads a form's operands by their place and checks them. Functions throw PluginError.
class AttentionSignature {
 public:
  explicit AttentionSignature(int form);

  const AttentionForm& form() const { return form_; }
  int32_t count() const { return static_cast<int32_t>(inputs_.size()); }
  int32_t index(AttentionInput input) const;  // -1 where the form has no such input
  const char* name(int32_t i) const;

  // The cache's inputs follow each other: the first one and their number.
  int32_t first_cached() const { return index(AttentionInput::kSinkKey); }
  int32_t cached() const;

  // The type of input i; `activation` is that of the queries.
  nvinfer1::DataType type(int32_t i, nvinfer1::DataType activation) const;
  void require_rank(int32_t i, int32_t rank) const;

  // Fills in the batch, tokens, groups and angles that the shapes say; refuses a shape that is not what the
  // numbers of `problem` ask for.
  void read_shapes(const std::vector<nvinfer1::Dims>& shapes, sink_window_attention::Problem& problem) const;

  sink_window_attention::Operands operands(const void* const* inputs, void* const* outputs) const;

 private:
  std::vector<int64_t> expected_shape(int32_t i, const sink_window_attention::Problem& problem) const;

  const AttentionForm& form_;
  std::vector<AttentionInput> inputs_;
};

}  // namespace rotexport
