// The creators of every plugin here.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

namespace rotexport {

const std::vector<nvinfer1::IPluginCreatorInterface*>& creators();

}  // namespace rotexport
