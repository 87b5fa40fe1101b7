// What a plugin is attached to without TensorRT: an error recorder, and no memory of its own.
#pragma once

#include <NvInferRuntime.h>

namespace rotexport {

class ResourceContext : public nvinfer1::IPluginResourceContext {
 public:
  explicit ResourceContext(nvinfer1::IErrorRecorder* recorder) : recorder_(recorder) {}
  nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return recorder_; }

 private:
  nvinfer1::IErrorRecorder* recorder_;
};

}  // namespace rotexport
