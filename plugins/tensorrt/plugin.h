// What every plugin shares: identity, capabilities, cloning and error reports. A plugin derives from
// Plugin<itself> and says only what is its own; its creator is Creator<it>.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <new>
#include <string>
#include <vector>

#include "tensorrt/fields.h"
#include "tensorrt/report.h"

namespace rotexport {

constexpr const char* kNamespace = "rotexport";
constexpr const char* kVersion = "1";

// A plugin refuses what it is asked; the message reaches TensorRT's error recorder.
struct PluginError {
  std::string message;
};

template <class Derived>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return new (std::nothrow) Derived(static_cast<const Derived&>(*this));
  }

  const char* getPluginName() const noexcept override { return self().name(); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override {
    auto* attached = static_cast<Derived*>(clone());
    if (attached && context) attached->recorder_ = context->getErrorRecorder();
    return attached;
  }

 protected:
  // Runs `action`; 0, or -1 with the failure reported. No exception may leave a plugin.
  template <class Action>
  int32_t guarded(nvinfer1::ErrorCode code, const Action& action) const noexcept {
    try {
      action();
      return 0;
    } catch (const PluginError& error) {
      report(recorder_, code, self().name(), error.message);
    } catch (const std::exception& error) {
      report(recorder_, code, self().name(), error.what());
    }
    return -1;
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }

  nvinfer1::IErrorRecorder* recorder_ = nullptr;
};

// Creates `Made`, which has: static const char* operator_name(); static std::vector<PluginField> fields();
// and a constructor from a FieldReader that throws FieldError or PluginError.
template <class Made>
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() : fields_(Made::fields()), collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    std::string message;
    try {
      return new Made(FieldReader(fields, fields_));
    } catch (const FieldError& error) {
      message = error.message;
    } catch (const PluginError& error) {
      message = error.message;
    } catch (const std::exception& error) {
      report(nullptr, nvinfer1::ErrorCode::kFAILED_INITIALIZATION, Made::operator_name(), error.what());
      return nullptr;
    }
    report(nullptr, nvinfer1::ErrorCode::kINVALID_ARGUMENT, Made::operator_name(), message);
    return nullptr;
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Made::operator_name(); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace rotexport
