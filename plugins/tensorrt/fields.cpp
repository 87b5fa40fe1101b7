#include "tensorrt/fields.h"

#include <cstring>

namespace rotexport {
namespace {

const char* name_of(nvinfer1::PluginFieldType type) {
  switch (type) {
    case nvinfer1::PluginFieldType::kFLOAT32:
      return "float32";
    case nvinfer1::PluginFieldType::kINT32:
      return "int32";
    case nvinfer1::PluginFieldType::kCHAR:
      return "string";
    default:
      return "another type";
  }
}

bool same(const char* a, const char* b) { return a && b && std::strcmp(a, b) == 0; }

}  // namespace

FieldReader::FieldReader(const nvinfer1::PluginFieldCollection* fields,
                         const std::vector<nvinfer1::PluginField>& known)
    : fields_(fields) {
  if (!fields || (fields->nbFields > 0 && !fields->fields)) throw FieldError{"no field collection"};
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const char* name = fields->fields[i].name;
    bool is_known = false;
    for (const nvinfer1::PluginField& field : known) is_known = is_known || same(field.name, name);
    if (!is_known) throw FieldError{std::string("unknown field '") + (name ? name : "") + "'"};
    for (int32_t j = 0; j < i; ++j) {
      if (same(fields->fields[j].name, name))
        throw FieldError{std::string("field '") + name + "' is given twice"};
    }
  }
}

const nvinfer1::PluginField& FieldReader::find(const char* name, nvinfer1::PluginFieldType type) const {
  for (int32_t i = 0; i < fields_->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields_->fields[i];
    if (!same(field.name, name)) continue;
    if (field.type != type) {
      throw FieldError{std::string("field '") + name + "' is of type " + name_of(field.type) + ", must be " +
                       name_of(type)};
    }
    if (field.length != 1 || !field.data) {
      throw FieldError{std::string("field '") + name + "' has " + std::to_string(field.length) +
                       " values, must have one"};
    }
    return field;
  }
  throw FieldError{std::string("field '") + name + "' is missing"};
}

float FieldReader::read_float(const char* name) const {
  float value;
  std::memcpy(&value, find(name, nvinfer1::PluginFieldType::kFLOAT32).data, sizeof value);
  return value;
}

int32_t FieldReader::read_int(const char* name) const {
  int32_t value;
  std::memcpy(&value, find(name, nvinfer1::PluginFieldType::kINT32).data, sizeof value);
  return value;
}

}  // namespace rotexport
