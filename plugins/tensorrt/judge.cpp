// Says before a build whether a plugin takes a node: for callers that can give TensorRT the node's body
// instead. The plugin itself is asked, as TensorRT will ask it, so limits are stated where the kernels are.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>

#include "tensorrt/library.h"
#include "tensorrt/plugin.h"
#include "tensorrt/resource_context.h"

namespace rotexport {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;

// An attribute of the node: one number, of a PluginFieldType.
struct NodeField {
  const char* name;
  int32_t type;
  const void* data;
};

// An input of the node: a DataType, and the smallest and the largest shape.
struct NodeInput {
  int32_t type;
  int32_t rank;
  int64_t smallest[nvinfer1::Dims::MAX_DIMS];
  int64_t largest[nvinfer1::Dims::MAX_DIMS];
};

// The last thing that was complained of, to the logger or to the error recorder.
class Complaint : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder, public nvinfer1::IErrorRecorder {
 public:
  const std::string& text() const { return text_; }

  void log(Severity, const char* message) noexcept override { text_ = message; }
  nvinfer1::ILogger* findLogger() override { return this; }
  int32_t getNbErrors() const noexcept override { return text_.empty() ? 0 : 1; }
  nvinfer1::ErrorCode getErrorCode(int32_t) const noexcept override {
    return nvinfer1::ErrorCode::kINVALID_ARGUMENT;
  }
  const char* getErrorDesc(int32_t) const noexcept override { return text_.c_str(); }
  bool hasOverflowed() const noexcept override { return false; }
  void clear() noexcept override { text_.clear(); }
  bool reportError(nvinfer1::ErrorCode, const char* message) noexcept override {
    text_ = message;
    return true;
  }
  int32_t incRefCount() noexcept override { return 1; }
  int32_t decRefCount() noexcept override { return 1; }

 private:
  std::string text_;
};

nvinfer1::IPluginCreatorV3One* find_creator(const char* name) {
  for (nvinfer1::IPluginCreatorInterface* creator : creators()) {
    auto* found = static_cast<nvinfer1::IPluginCreatorV3One*>(creator);
    if (std::strcmp(found->getPluginName(), name) == 0) return found;
  }
  return nullptr;
}

std::vector<DynamicPluginTensorDesc> describe(const NodeInput* inputs, int32_t count) {
  std::vector<DynamicPluginTensorDesc> described(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    DynamicPluginTensorDesc& to = described[i];
    to.min.nbDims = to.max.nbDims = inputs[i].rank;
    std::copy_n(inputs[i].smallest, inputs[i].rank, to.min.d);
    std::copy_n(inputs[i].largest, inputs[i].rank, to.max.d);
    to.desc = {to.max, static_cast<DataType>(inputs[i].type), nvinfer1::TensorFormat::kLINEAR, 1.0f};
    to.opt = to.max;
  }
  return described;
}

// Whether a plugin at the start of its life takes tensors so described.
bool takes(nvinfer1::IPluginV3OneBuild& build, std::vector<DynamicPluginTensorDesc> tensors,
           Complaint& complaint) {
  const auto inputs = static_cast<int32_t>(tensors.size());
  const int32_t outputs = build.getNbOutputs();
  std::vector<DataType> input_types;
  for (const DynamicPluginTensorDesc& tensor : tensors) input_types.push_back(tensor.desc.type);
  std::vector<DataType> output_types(static_cast<size_t>(outputs));
  if (build.getOutputDataTypes(output_types.data(), outputs, input_types.data(), inputs) != 0) return false;
  for (const DataType type : output_types) {
    tensors.push_back({{{}, type, nvinfer1::TensorFormat::kLINEAR, 1.0f}, {}, {}, {}});
  }
  for (int32_t i = 0; i < inputs; ++i) {
    if (build.supportsFormatCombination(i, tensors.data(), inputs, outputs)) continue;
    complaint.log(nvinfer1::ILogger::Severity::kERROR,
                  ("its kernel has no form for the type of input " + std::to_string(i)).c_str());
    return false;
  }
  return build.configurePlugin(tensors.data(), inputs, tensors.data() + inputs, outputs) == 0;
}

bool judge(const char* plugin, const std::vector<nvinfer1::PluginField>& fields,
           std::vector<DynamicPluginTensorDesc> inputs, Complaint& complaint) {
  nvinfer1::IPluginCreatorV3One* creator = find_creator(plugin);
  if (!creator) {
    complaint.log(nvinfer1::ILogger::Severity::kERROR, "the library has no such plugin");
    return false;
  }
  const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
  const std::unique_ptr<nvinfer1::IPluginV3> created(
      creator->createPlugin("node", &collection, nvinfer1::TensorRTPhase::kBUILD));
  if (!created) return false;
  auto* runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(
      created->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  ResourceContext context(&complaint);
  const std::unique_ptr<nvinfer1::IPluginV3> attached(runtime->attachToContext(&context));
  if (!attached) return false;
  auto* build = static_cast<nvinfer1::IPluginV3OneBuildV2*>(
      attached->getCapabilityInterface(PluginCapabilityType::kBUILD));
  return takes(*build, std::move(inputs), complaint);
}

}  // namespace
}  // namespace rotexport

// Returns 0 where the plugin takes the node, else 1 with the reason in `message`. Takes the library's logger
// for itself: for a process that asks and does nothing else.
extern "C" __attribute__((visibility("default"))) int rotexport_judge(
    const char* plugin, const rotexport::NodeField* fields, int32_t field_count,
    const rotexport::NodeInput* inputs, int32_t input_count, char* message, size_t capacity) {
  rotexport::Complaint complaint;
  rotexport::set_logger_finder(&complaint);
  std::vector<nvinfer1::PluginField> given;
  for (int32_t i = 0; i < field_count; ++i) {
    given.emplace_back(fields[i].name, fields[i].data, static_cast<nvinfer1::PluginFieldType>(fields[i].type),
                       1);
  }
  const bool taken = rotexport::judge(plugin, given, rotexport::describe(inputs, input_count), complaint);
  rotexport::set_logger_finder(nullptr);
  if (!taken) std::snprintf(message, capacity, "%s", complaint.text().c_str());
  return taken ? 0 : 1;
}
