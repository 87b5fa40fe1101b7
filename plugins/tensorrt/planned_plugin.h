// Plugins that run a plan which follows from the shapes and types of their inputs. Besides what plugin.h asks
// for, one says:
//
//   std::vector<PluginField> own_fields() const;   fields() with pointers to its own values
//   int32_t input_count() const;
//   void output_types(const DataType* inputs, DataType* outputs) const;               throw PluginError
//   void output_shapes(const DimsExprs* inputs, DimsExprs* outputs, IExprBuilder&) const;
//   bool takes(int32_t position, const DynamicPluginTensorDesc* tensors) const;   whether it may be so, if
//   the
//                                                       tensors before it are as described and all are linear
//   Plan plan_for(const PluginInputs&) const;      throws PluginError
//   size_t workspace_for(const Plan&) const;       the most that the plan or one of a smaller call needs
//   void run(const Plan&, const void* const* inputs, void* const* outputs, void* workspace, cudaStream_t)
//   const;
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "kernels/status.h"
#include "tensorrt/plugin.h"

namespace rotexport {

struct PluginInputs {
  std::vector<nvinfer1::Dims> shapes;
  std::vector<nvinfer1::DataType> types;
};

template <class Derived>
class PlannedPlugin : public Plugin<Derived> {
 public:
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs, int32_t input_count) const noexcept override {
    return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
      require_counts(input_count, output_count);
      self().output_types(inputs, outputs);
    });
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
      require_counts(input_count, output_count);
      self().output_shapes(inputs, outputs, builder);
    });
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override {
    if (input_count != self().input_count() || output_count != self().getNbOutputs()) return false;
    if (position < 0 || position >= input_count + output_count) return false;
    if (tensors[position].desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    return self().takes(position, tensors);
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t output_count) noexcept override {
    return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
      require_counts(input_count, output_count);
      self().plan_for(extreme(inputs, input_count, &nvinfer1::DynamicPluginTensorDesc::min));
      self().plan_for(extreme(inputs, input_count, &nvinfer1::DynamicPluginTensorDesc::max));
    });
  }

  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t output_count) const noexcept override {
    size_t bytes = 0;
    this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
      require_counts(input_count, output_count);
      bytes = self().workspace_for(
          self().plan_for(extreme(inputs, input_count, &nvinfer1::DynamicPluginTensorDesc::max)));
    });
    return bytes;
  }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc*, int32_t output_count) noexcept override {
    return this->guarded(nvinfer1::ErrorCode::kINVALID_ARGUMENT, [&] {
      require_counts(input_count, output_count);
      self().plan_for(bound(inputs));
    });
  }

  // Planning is arithmetic on a few integers: cheaper than keeping a plan in step with shapes.
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                  const void* const* input_data, void* const* output_data, void* workspace,
                  cudaStream_t stream) noexcept override {
    return this->guarded(nvinfer1::ErrorCode::kFAILED_EXECUTION, [&] {
      self().run(self().plan_for(bound(inputs)), input_data, output_data, workspace, stream);
    });
  }

  const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    const int32_t failed = this->guarded(nvinfer1::ErrorCode::kFAILED_ALLOCATION,
                                         [&] { serialized_fields_ = self().own_fields(); });
    serialized_ = {static_cast<int32_t>(serialized_fields_.size()), serialized_fields_.data()};
    return failed ? nullptr : &serialized_;
  }

 protected:
  void require_counts(int32_t input_count, int32_t output_count) const {
    if (input_count == self().input_count() && output_count == self().getNbOutputs()) return;
    throw PluginError{std::to_string(input_count) + " inputs and " + std::to_string(output_count) +
                      " outputs, must be " + std::to_string(self().input_count()) + " and " +
                      std::to_string(self().getNbOutputs())};
  }

  static void require(const Status& done) {
    if (!done) throw PluginError{done.message};
  }

  // What tells plugins of the name apart for whom TensorRT times tactics.
  std::string timing_id_;

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }

  static PluginInputs extreme(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                              nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* which) {
    PluginInputs found;
    for (int32_t i = 0; i < count; ++i) {
      found.shapes.push_back(inputs[i].*which);
      found.types.push_back(inputs[i].desc.type);
    }
    return found;
  }

  PluginInputs bound(const nvinfer1::PluginTensorDesc* inputs) const {
    PluginInputs found;
    for (int32_t i = 0; i < self().input_count(); ++i) {
      found.shapes.push_back(inputs[i].dims);
      found.types.push_back(inputs[i].type);
    }
    return found;
  }

  std::vector<nvinfer1::PluginField> serialized_fields_;
  nvinfer1::PluginFieldCollection serialized_{};
};

// Owns one creator for each of a family of plugins, which are told apart by a number.
template <template <int> class Family, class Numbers>
struct Creators;

template <template <int> class Family, int... kNumbers>
struct Creators<Family, std::integer_sequence<int, kNumbers...>> {
  static void add_to(std::vector<nvinfer1::IPluginCreatorInterface*>& creators) {
    static std::tuple<Creator<Family<kNumbers>>...> made;
    (creators.push_back(&std::get<kNumbers>(made)), ...);
  }
};

}  // namespace rotexport
