// The two symbols by which TensorRT finds the plugins of a library. Nothing here needs libnvinfer.

#include "tensorrt/library.h"

#include "tensorrt/attention_plugin.h"
#include "tensorrt/eviction_plugin.h"
#include "tensorrt/fast_hadamard_plugin.h"
#include "tensorrt/quantized_linear_plugin.h"
#include "tensorrt/report.h"

namespace {

using fast_hadamard::Output;
using rotexport::Creator;
using rotexport::FastHadamardPlugin;

struct Creators {
  Creator<FastHadamardPlugin<Output::kSame>> plain;
  Creator<FastHadamardPlugin<Output::kInt8>> int8;
  Creator<FastHadamardPlugin<Output::kInt4>> int4;
  std::vector<nvinfer1::IPluginCreatorInterface*> all = {&plain, &int8, &int4};

  Creators() {
    rotexport::add_linear_creators(all);
    rotexport::add_attention_creators(all);
    rotexport::add_eviction_creators(all);
  }
};

}  // namespace

const std::vector<nvinfer1::IPluginCreatorInterface*>& rotexport::creators() {
  static const ::Creators made;
  return made.all;
}

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  const auto& all = rotexport::creators();
  count = static_cast<int32_t>(all.size());
  return all.data();
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  rotexport::set_logger_finder(finder);
}
