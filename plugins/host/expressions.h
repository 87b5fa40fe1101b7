// TensorRT's symbolic dimensions, with values: an expression knows what it comes to for the shapes of one
// run.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <vector>

namespace host {

class Expression : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
 public:
  Expression(int64_t value, bool constant) : value_(value), constant_(constant) { mImpl = this; }
  int64_t value() const { return value_; }

 private:
  bool isConstant() const override { return constant_; }
  int64_t getConstantValue() const override { return constant_ ? value_ : INT64_MIN; }
  bool isSizeTensor() const override { return false; }

  int64_t value_;
  bool constant_;
};

class ExpressionBuilder : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
 public:
  ExpressionBuilder() { mImpl = this; }
  const nvinfer1::IDimensionExpr* variable(int64_t value) { return keep(value, false); }
  const nvinfer1::IDimensionExpr* constant(int64_t value) override { return keep(value, true); }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation operation,
                                            const nvinfer1::IDimensionExpr& first,
                                            const nvinfer1::IDimensionExpr& second) override;
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;  // no plugin here has a shape that depends on data
  }

 private:
  const nvinfer1::IDimensionExpr* keep(int64_t value, bool constant);

  std::vector<std::unique_ptr<Expression>> kept_;
};

}  // namespace host
