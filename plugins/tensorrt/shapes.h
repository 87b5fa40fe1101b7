// Shapes in messages, and checks that all plugins make.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "tensorrt/plugin.h"

namespace rotexport {

inline std::string text(const nvinfer1::Dims& shape) {
  std::string result = "[";
  for (int32_t i = 0; i < shape.nbDims; ++i) result += (i ? ", " : "") + std::to_string(shape.d[i]);
  return result + "]";
}

inline void require_aligned(const void* address, const char* name) {
  if (reinterpret_cast<uintptr_t>(address) % 16 == 0) return;
  throw PluginError{std::string("'") + name + "' must be aligned to 16 bytes"};
}

}  // namespace rotexport
