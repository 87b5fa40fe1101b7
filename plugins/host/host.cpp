#include "host/host.h"

#include <dlfcn.h>

#include <cstring>

#include "host/expressions.h"
#include "host/memory.h"
#include "tensorrt/resource_context.h"

namespace host {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

using PluginPointer = std::unique_ptr<nvinfer1::IPluginV3>;

constexpr DataType kPluginTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kINT8,
                                     DataType::kINT32, DataType::kBF16, DataType::kINT64};

// Field collections that own what they point to.
class Collection {
 public:
  explicit Collection(const std::vector<Field>& fields) : owned_(fields) { point(); }

  explicit Collection(const nvinfer1::PluginFieldCollection& other) {
    for (int32_t i = 0; i < other.nbFields; ++i) {
      const nvinfer1::PluginField& field = other.fields[i];
      const auto* bytes = static_cast<const char*>(field.data);
      const size_t size = field.length * element_size(field.type);
      owned_.push_back({field.name, field.type, std::vector<char>(bytes, bytes + size), field.length});
    }
    point();
  }

  const nvinfer1::PluginFieldCollection* get() const { return &collection_; }

 private:
  static size_t element_size(nvinfer1::PluginFieldType type) {
    switch (type) {
      case nvinfer1::PluginFieldType::kFLOAT32:
      case nvinfer1::PluginFieldType::kINT32:
        return 4;
      case nvinfer1::PluginFieldType::kFLOAT64:
      case nvinfer1::PluginFieldType::kINT64:
        return 8;
      default:
        return 1;
    }
  }

  void point() {
    for (const Field& field : owned_)
      pointers_.emplace_back(field.name.c_str(), field.data.data(), field.type, field.length);
    collection_ = {static_cast<int32_t>(pointers_.size()), pointers_.data()};
  }

  std::vector<Field> owned_;
  std::vector<nvinfer1::PluginField> pointers_;
  nvinfer1::PluginFieldCollection collection_;
};

template <class Capability>
Capability& capability(nvinfer1::IPluginV3& plugin, nvinfer1::PluginCapabilityType type, const char* kind) {
  auto* found = static_cast<Capability*>(plugin.getCapabilityInterface(type));
  if (!found || std::strcmp(found->getInterfaceInfo().kind, kind) != 0) {
    throw Failure(std::string("the plugin gives no capability ") + kind);
  }
  return *found;
}

nvinfer1::IPluginV3OneBuildV2& build_of(nvinfer1::IPluginV3& plugin) {
  return capability<nvinfer1::IPluginV3OneBuildV2>(plugin, nvinfer1::PluginCapabilityType::kBUILD,
                                                   "PLUGIN_V3ONE_BUILD");
}

nvinfer1::IPluginV3OneRuntime& runtime_of(nvinfer1::IPluginV3& plugin) {
  return capability<nvinfer1::IPluginV3OneRuntime>(plugin, nvinfer1::PluginCapabilityType::kRUNTIME,
                                                   "PLUGIN_V3ONE_RUNTIME");
}

void require(Library& library, bool success, const char* step) {
  if (!success) throw Failure(std::string(step) + ": " + library.messages().take());
}

PluginPointer create(Library& library, const std::string& name, const Collection& fields,
                     TensorRTPhase phase) {
  PluginPointer plugin(library.creator(name).createPlugin("node", fields.get(), phase));
  require(library, plugin != nullptr, "createPlugin");
  auto& core = capability<nvinfer1::IPluginV3OneCore>(*plugin, nvinfer1::PluginCapabilityType::kCORE,
                                                      "PLUGIN_V3ONE_CORE");
  if (core.getPluginName() != name)
    throw Failure("the plugin of creator " + name + " calls itself " + core.getPluginName());
  return plugin;
}

// Attached to nothing a plugin has no recorder; TensorRT builds with an attached one too.
PluginPointer attach(Library& library, nvinfer1::IPluginV3& plugin, rotexport::ResourceContext& context) {
  PluginPointer attached(runtime_of(plugin).attachToContext(&context));
  require(library, attached != nullptr, "attachToContext");
  return attached;
}

std::vector<DataType> output_types(Library& library, nvinfer1::IPluginV3OneBuild& build,
                                   const Request& request) {
  std::vector<DataType> inputs;
  for (const Tensor& input : request.inputs) inputs.push_back(input.type);
  std::vector<DataType> outputs(build.getNbOutputs());
  require(library,
          build.getOutputDataTypes(outputs.data(), build.getNbOutputs(), inputs.data(),
                                   static_cast<int32_t>(inputs.size())) == 0,
          "getOutputDataTypes");
  return outputs;
}

// All dimensions of the first input but the last are symbolic, as batch and sequence are.
std::vector<Dims> output_shapes(Library& library, nvinfer1::IPluginV3OneBuild& build,
                                const Request& request) {
  ExpressionBuilder builder;
  std::vector<nvinfer1::DimsExprs> inputs;
  for (const Tensor& tensor : request.inputs) {
    nvinfer1::DimsExprs shape{tensor.dims.nbDims, {}};
    for (int32_t i = 0; i < shape.nbDims; ++i) {
      const bool symbolic = inputs.empty() && i + 1 < shape.nbDims;
      shape.d[i] = symbolic ? builder.variable(tensor.dims.d[i]) : builder.constant(tensor.dims.d[i]);
    }
    inputs.push_back(shape);
  }
  std::vector<nvinfer1::DimsExprs> outputs(build.getNbOutputs());
  require(library,
          build.getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                outputs.data(), build.getNbOutputs(), builder) == 0,
          "getOutputShapes");
  std::vector<Dims> shapes;
  for (const nvinfer1::DimsExprs& output : outputs) {
    Dims dims{output.nbDims, {}};
    for (int32_t i = 0; i < output.nbDims; ++i)
      dims.d[i] = static_cast<const Expression*>(output.d[i])->value();
    shapes.push_back(dims);
  }
  return shapes;
}

DynamicPluginTensorDesc describe(DataType type, const Dims& dims, const Dims& largest) {
  return {{dims, type, TensorFormat::kLINEAR, 1.0f}, dims, largest, dims};
}

std::vector<DynamicPluginTensorDesc> describe_inputs(const Request& request) {
  std::vector<DynamicPluginTensorDesc> descriptions;
  for (size_t i = 0; i < request.inputs.size(); ++i) {
    const Tensor& input = request.inputs[i];
    descriptions.push_back(
        describe(input.type, input.dims, request.largest.empty() ? input.dims : request.largest[i]));
  }
  return descriptions;
}

std::vector<DynamicPluginTensorDesc> describe_outputs(const std::vector<Tensor>& outputs) {
  std::vector<DynamicPluginTensorDesc> descriptions;
  for (const Tensor& output : outputs)
    descriptions.push_back(describe(output.type, output.dims, output.dims));
  return descriptions;
}

void require_formats(Library& library, nvinfer1::IPluginV3OneBuild& build,
                     std::vector<DynamicPluginTensorDesc> all, int32_t input_count) {
  const auto count = static_cast<int32_t>(all.size());
  for (int32_t i = 0; i < count; ++i) {
    require(library, build.supportsFormatCombination(i, all.data(), input_count, count - input_count),
            ("supportsFormatCombination refuses tensor " + std::to_string(i)).c_str());
  }
}

std::vector<PluginTensorDesc> bind(const std::vector<DynamicPluginTensorDesc>& descriptions) {
  std::vector<PluginTensorDesc> bound;
  for (const DynamicPluginTensorDesc& description : descriptions) bound.push_back(description.desc);
  return bound;
}

std::vector<DeviceBuffer> buffers_for(const std::vector<Tensor>& tensors, const char* name) {
  std::vector<DeviceBuffer> buffers;
  for (size_t i = 0; i < tensors.size(); ++i) {
    buffers.emplace_back(byte_size(tensors[i].type, tensors[i].dims), (name + std::to_string(i)).c_str());
    if (!tensors[i].data.empty()) buffers.back().upload(tensors[i].data.data(), tensors[i].data.size());
  }
  return buffers;
}

// For each output the input whose buffer it shares, or -1.
std::vector<int32_t> aliases_of(nvinfer1::IPluginV3OneBuildV2& build, const Request& request) {
  std::vector<int32_t> aliases;
  for (int32_t i = 0; i < build.getNbOutputs(); ++i) {
    const int32_t input = build.getAliasedInput(i);
    if (input >= static_cast<int32_t>(request.inputs.size())) {
      throw Failure("output " + std::to_string(i) + " is aliased to an input that does not exist");
    }
    aliases.push_back(request.aliases ? input : -1);
  }
  return aliases;
}

void enqueue(Library& library, nvinfer1::IPluginV3OneRuntime& runtime, const Request& request,
             const std::vector<int32_t>& aliases, std::vector<Tensor>& outputs, size_t workspace_bytes) {
  const std::vector<PluginTensorDesc> inputs_described = bind(describe_inputs(request));
  const std::vector<PluginTensorDesc> outputs_described = bind(describe_outputs(outputs));
  std::vector<DeviceBuffer> input_buffers = buffers_for(request.inputs, "input ");
  std::vector<DeviceBuffer> output_buffers = buffers_for(outputs, "output ");
  DeviceBuffer workspace(workspace_bytes, "workspace");
  std::vector<const void*> input_data;
  std::vector<void*> output_data;
  for (const DeviceBuffer& buffer : input_buffers) input_data.push_back(buffer.data());
  for (size_t i = 0; i < outputs.size(); ++i) {
    const DeviceBuffer& bound = aliases[i] < 0 ? output_buffers[i] : input_buffers[aliases[i]];
    output_data.push_back(bound.data());
  }
  require(
      library,
      runtime.onShapeChange(inputs_described.data(), static_cast<int32_t>(inputs_described.size()),
                            outputs_described.data(), static_cast<int32_t>(outputs_described.size())) == 0,
      "onShapeChange");
  require(library,
          runtime.enqueue(inputs_described.data(), outputs_described.data(), input_data.data(),
                          output_data.data(), workspace.data(), nullptr) == 0,
          "enqueue");
  for (size_t i = 0; i < outputs.size(); ++i) {
    outputs[i].data.resize(byte_size(outputs[i].type, outputs[i].dims));
    const DeviceBuffer& bound = aliases[i] < 0 ? output_buffers[i] : input_buffers[aliases[i]];
    bound.download(outputs[i].data.data(), outputs[i].data.size());
  }
}

}  // namespace

size_t byte_size(DataType type, const Dims& dims) {
  size_t bytes = 1;
  switch (type) {
    case DataType::kFLOAT:
    case DataType::kINT32:
      bytes = 4;
      break;
    case DataType::kHALF:
    case DataType::kBF16:
      bytes = 2;
      break;
    case DataType::kINT64:
      bytes = 8;
      break;
    default:
      break;
  }
  for (int32_t i = 0; i < dims.nbDims; ++i) bytes *= static_cast<size_t>(dims.d[i]);
  return bytes;
}

void Messages::log(Severity severity, const char* message) noexcept {
  if (severity <= Severity::kERROR) errors_.push_back(std::string("logged ") + message);
}

bool Messages::reportError(nvinfer1::ErrorCode, const char* description) noexcept {
  errors_.push_back(std::string("recorded ") + description);
  return true;
}

std::string Messages::take() {
  std::string all;
  for (const std::string& error : errors_) all += (all.empty() ? "" : "; ") + error;
  errors_.clear();
  return all.empty() ? "no message" : all;
}

Library::Library(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw Failure(dlerror());
  using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
  using SetLoggerFinder = void (*)(nvinfer1::ILoggerFinder*);
  auto get_creators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
  auto set_logger_finder = reinterpret_cast<SetLoggerFinder>(dlsym(handle, "setLoggerFinder"));
  if (!get_creators || !set_logger_finder)
    throw Failure(path + " does not export getCreators and setLoggerFinder");
  set_logger_finder(&messages_);
  creators_ = get_creators(count_);
}

nvinfer1::IPluginCreatorV3One& Library::creator(const std::string& name) const {
  for (int32_t i = 0; i < count_; ++i) {
    if (std::strcmp(creators_[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
    auto& found = static_cast<nvinfer1::IPluginCreatorV3One&>(*creators_[i]);
    if (name == found.getPluginName()) return found;
  }
  throw Failure("no creator of " + name);
}

std::string Library::creators() const {
  std::string lines;
  for (int32_t i = 0; i < count_; ++i) {
    auto& creator = static_cast<nvinfer1::IPluginCreatorV3One&>(*creators_[i]);
    lines += std::string(creator.getPluginName()) + "\t" + creator.getPluginVersion() + "\t" +
             creator.getPluginNamespace() + "\t" + creator.getInterfaceInfo().kind;
    const nvinfer1::PluginFieldCollection* fields = creator.getFieldNames();
    for (int32_t j = 0; j < fields->nbFields; ++j) {
      const nvinfer1::PluginField& field = fields->fields[j];
      lines += std::string("\t") + field.name + ":" + std::to_string(static_cast<int>(field.type)) + ":" +
               std::to_string(field.length);
    }
    lines += "\n";
  }
  return lines;
}

std::vector<Tensor> live(Library& library, const Request& request) {
  library.messages().clear();
  rotexport::ResourceContext context(&library.messages());
  const Collection fields(request.fields);
  PluginPointer created = create(library, request.plugin, fields, TensorRTPhase::kBUILD);
  PluginPointer built = attach(library, *created, context);
  nvinfer1::IPluginV3OneBuildV2& build = build_of(*built);

  std::vector<Tensor> outputs;
  const std::vector<DataType> types = output_types(library, build, request);
  const std::vector<Dims> shapes = output_shapes(library, build, request);
  for (size_t i = 0; i < types.size(); ++i) outputs.push_back({types[i], shapes[i], {}});

  const std::vector<DynamicPluginTensorDesc> inputs_described = describe_inputs(request);
  const std::vector<DynamicPluginTensorDesc> outputs_described = describe_outputs(outputs);
  std::vector<DynamicPluginTensorDesc> all = inputs_described;
  all.insert(all.end(), outputs_described.begin(), outputs_described.end());
  const auto input_count = static_cast<int32_t>(inputs_described.size());
  const auto output_count = static_cast<int32_t>(outputs.size());
  require_formats(library, build, all, input_count);
  require(library,
          build.configurePlugin(inputs_described.data(), input_count, outputs_described.data(),
                                output_count) == 0,
          "configurePlugin");
  const size_t workspace =
      build.getWorkspaceSize(inputs_described.data(), input_count, outputs_described.data(), output_count);

  const std::vector<int32_t> aliases = aliases_of(build, request);

  PluginPointer cloned(built->clone());
  require(library, cloned != nullptr, "clone");
  const Collection serialized(*runtime_of(*cloned).getFieldsToSerialize());
  cloned.reset();
  built.reset();
  created.reset();

  PluginPointer restored = create(library, request.plugin, serialized, TensorRTPhase::kRUNTIME);
  PluginPointer attached = attach(library, *restored, context);
  restored.reset();  // an attached plugin stands alone
  enqueue(library, runtime_of(*attached), request, aliases, outputs, workspace);
  return outputs;
}

std::string combinations(Library& library, const Request& request) {
  PluginPointer plugin = create(library, request.plugin, Collection(request.fields), TensorRTPhase::kBUILD);
  nvinfer1::IPluginV3OneBuildV2& build = build_of(*plugin);
  const auto input_count = static_cast<int32_t>(request.inputs.size());
  const int32_t count = input_count + build.getNbOutputs();
  std::vector<DynamicPluginTensorDesc> all(
      count, describe(DataType::kFLOAT, request.inputs[0].dims, request.inputs[0].dims));
  std::string accepted;
  int other_formats = 0;
  // Depth first, as TensorRT does it: position by position, each seeing only what was chosen before it.
  std::vector<size_t> choice(1, 0);
  while (!choice.empty()) {
    const auto position = static_cast<int32_t>(choice.size()) - 1;
    if (choice.back() == std::size(kPluginTypes)) {
      choice.pop_back();
      if (!choice.empty()) ++choice.back();
      continue;
    }
    all[position].desc.type = kPluginTypes[choice.back()];
    all[position].desc.format = TensorFormat::kCHW32;
    other_formats += build.supportsFormatCombination(position, all.data(), input_count, count - input_count);
    all[position].desc.format = TensorFormat::kLINEAR;
    if (!build.supportsFormatCombination(position, all.data(), input_count, count - input_count)) {
      ++choice.back();
    } else if (position + 1 < count) {
      choice.push_back(0);
    } else {
      for (int32_t i = 0; i < count; ++i)
        accepted += (i ? "," : "") + std::to_string(static_cast<int>(all[i].desc.type));
      accepted += "\n";
      ++choice.back();
    }
  }
  return accepted + std::to_string(other_formats) + "\n";
}

}  // namespace host
