// Reads the fields that a plugin is created from. Every field must be known, present, once, of its type and
// length.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace rotexport {

struct FieldError {
  std::string message;
};

class FieldReader {
 public:
  // Throws FieldError when `fields` holds something that is not in `known`, or holds it twice.
  FieldReader(const nvinfer1::PluginFieldCollection* fields, const std::vector<nvinfer1::PluginField>& known);

  // Throw FieldError when the field is missing or is no single number of the type.
  float read_float(const char* name) const;
  int32_t read_int(const char* name) const;

 private:
  const nvinfer1::PluginField& find(const char* name, nvinfer1::PluginFieldType type) const;

  const nvinfer1::PluginFieldCollection* fields_;
};

}  // namespace rotexport
