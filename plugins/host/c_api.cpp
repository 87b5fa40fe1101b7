// The host for callers in other languages. Every function returns 0, or 1 with the reason in `message`.

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "host/host.h"

#define HOST_API extern "C" __attribute__((visibility("default")))

namespace {

struct CTensor {
  int32_t type;
  int32_t rank;
  int64_t dims[8];
  void* data;  // outputs: room for `bytes`
  int64_t bytes;
};

struct CField {
  const char* name;
  int32_t type;
  int32_t length;
  const void* data;
  int64_t bytes;
};

struct CRequest {
  const char* plugin;
  const CField* fields;
  int32_t field_count;
  const CTensor* inputs;
  int32_t input_count;
  const CTensor* largest;  // only shapes; nullptr: as the inputs
  int32_t aliases;
};

nvinfer1::Dims dims_of(const CTensor& tensor) {
  nvinfer1::Dims dims{tensor.rank, {}};
  std::copy_n(tensor.dims, 8, dims.d);
  return dims;
}

host::Request request_of(const CRequest& c) {
  host::Request request;
  request.plugin = c.plugin;
  request.aliases = c.aliases != 0;
  for (int32_t i = 0; i < c.field_count; ++i) {
    const CField& field = c.fields[i];
    const auto* bytes = static_cast<const char*>(field.data);
    request.fields.push_back({field.name, static_cast<nvinfer1::PluginFieldType>(field.type),
                              std::vector<char>(bytes, bytes + field.bytes), field.length});
  }
  for (int32_t i = 0; i < c.input_count; ++i) {
    const auto* bytes = static_cast<const char*>(c.inputs[i].data);
    request.inputs.push_back({static_cast<nvinfer1::DataType>(c.inputs[i].type), dims_of(c.inputs[i]),
                              std::vector<char>(bytes, bytes + c.inputs[i].bytes)});
    if (c.largest) request.largest.push_back(dims_of(c.largest[i]));
  }
  return request;
}

void copy_text(const std::string& text, char* to, size_t capacity) {
  std::snprintf(to, capacity, "%s", text.c_str());
}

template <class Action>
int guarded(char* message, size_t capacity, const Action& action) {
  try {
    action();
    return 0;
  } catch (const std::exception& error) {
    copy_text(error.what(), message, capacity);
    return 1;
  }
}

}  // namespace

HOST_API int host_open(const char* path, host::Library** library, char* message, size_t capacity) {
  return guarded(message, capacity, [&] { *library = new host::Library(path); });
}

HOST_API void host_close(host::Library* library) { delete library; }

HOST_API int host_creators(host::Library* library, char* text, size_t text_capacity, char* message,
                           size_t capacity) {
  return guarded(message, capacity, [&] { copy_text(library->creators(), text, text_capacity); });
}

HOST_API int host_combinations(host::Library* library, const CRequest* request, char* text,
                               size_t text_capacity, char* message, size_t capacity) {
  return guarded(message, capacity,
                 [&] { copy_text(host::combinations(*library, request_of(*request)), text, text_capacity); });
}

// Fills `outputs`, which has room for *output_count tensors, and sets *output_count.
HOST_API int host_live(host::Library* library, const CRequest* request, CTensor* outputs,
                       int32_t* output_count, char* message, size_t capacity) {
  return guarded(message, capacity, [&] {
    const std::vector<host::Tensor> results = host::live(*library, request_of(*request));
    if (static_cast<int32_t>(results.size()) > *output_count)
      throw host::Failure("too little room for the outputs");
    *output_count = static_cast<int32_t>(results.size());
    for (size_t i = 0; i < results.size(); ++i) {
      if (static_cast<int64_t>(results[i].data.size()) > outputs[i].bytes) {
        throw host::Failure("too little room for output " + std::to_string(i));
      }
      outputs[i].type = static_cast<int32_t>(results[i].type);
      outputs[i].rank = results[i].dims.nbDims;
      std::copy_n(results[i].dims.d, 8, outputs[i].dims);
      outputs[i].bytes = static_cast<int64_t>(results[i].data.size());
      std::memcpy(outputs[i].data, results[i].data.data(), results[i].data.size());
    }
  });
}
