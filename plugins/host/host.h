// Drives a plugin library through TensorRT's interfaces without TensorRT: loads it, creates a plugin, walks
// it through the build and the run as libnvinfer does, and reports what it did wrong.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace host {

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A tensor as TensorRT would bind it. Inputs bring `data`; outputs receive it.
struct Tensor {
  nvinfer1::DataType type;
  nvinfer1::Dims dims;
  std::vector<char> data;
};

size_t byte_size(nvinfer1::DataType type, const nvinfer1::Dims& dims);

struct Field {
  std::string name;
  nvinfer1::PluginFieldType type;
  std::vector<char> data;
  int32_t length;
};

// What the library wrote to the logger and the error recorder since the last call of `take`.
class Messages : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder, public nvinfer1::IErrorRecorder {
 public:
  void log(Severity severity, const char* message) noexcept override;
  nvinfer1::ILogger* findLogger() override { return this; }

  int32_t getNbErrors() const noexcept override { return static_cast<int32_t>(errors_.size()); }
  nvinfer1::ErrorCode getErrorCode(int32_t) const noexcept override {
    return nvinfer1::ErrorCode::kINTERNAL_ERROR;
  }
  const char* getErrorDesc(int32_t i) const noexcept override { return errors_[i].c_str(); }
  bool hasOverflowed() const noexcept override { return false; }
  void clear() noexcept override { errors_.clear(); }
  bool reportError(nvinfer1::ErrorCode code, const char* description) noexcept override;
  int32_t incRefCount() noexcept override { return 1; }
  int32_t decRefCount() noexcept override { return 1; }

  std::string take();

 private:
  std::vector<std::string> errors_;
};

class Library {
 public:
  explicit Library(const std::string& path);

  // One line per creator: name, version, namespace, interface, then name:type:length of each field, by tabs.
  std::string creators() const;
  nvinfer1::IPluginCreatorV3One& creator(const std::string& name) const;
  Messages& messages() { return messages_; }

 private:
  Messages messages_;
  nvinfer1::IPluginCreatorInterface* const* creators_;
  int32_t count_;
};

// What is asked of a plugin: its creation fields, inputs, and the largest shapes of the profile.
struct Request {
  std::string plugin;
  std::vector<Field> fields;
  std::vector<Tensor> inputs;
  std::vector<nvinfer1::Dims> largest;  // per input; empty: as the inputs
  bool aliases = true;                  // bind an output to the input that the plugin names for it
};

// The whole life of a plugin: create, ask for types, shapes and formats, configure, size the workspace,
// clone, serialize, destroy; create again from what was serialized, attach, change shapes, enqueue. Throws
// Failure with the step that failed and what the plugin reported.
std::vector<Tensor> live(Library& library, const Request& request);

// The (type, format) combinations that the plugin accepts for its tensors, each as "type,type,...": the
// product of all types, linear format; and, last, how many it accepts in any other format.
std::string combinations(Library& library, const Request& request);

}  // namespace host
