#include "host/expressions.h"

#include <algorithm>

namespace host {

const nvinfer1::IDimensionExpr* ExpressionBuilder::keep(int64_t value, bool constant) {
  kept_.push_back(std::make_unique<Expression>(value, constant));
  return kept_.back().get();
}

const nvinfer1::IDimensionExpr* ExpressionBuilder::operation(nvinfer1::DimensionOperation operation,
                                                             const nvinfer1::IDimensionExpr& first,
                                                             const nvinfer1::IDimensionExpr& second) {
  const int64_t a = static_cast<const Expression&>(first).value();
  const int64_t b = static_cast<const Expression&>(second).value();
  const bool constant = first.isConstant() && second.isConstant();
  switch (operation) {
    case nvinfer1::DimensionOperation::kSUM:
      return keep(a + b, constant);
    case nvinfer1::DimensionOperation::kPROD:
      return keep(a * b, constant);
    case nvinfer1::DimensionOperation::kMAX:
      return keep(std::max(a, b), constant);
    case nvinfer1::DimensionOperation::kMIN:
      return keep(std::min(a, b), constant);
    case nvinfer1::DimensionOperation::kSUB:
      return keep(a - b, constant);
    case nvinfer1::DimensionOperation::kEQUAL:
      return keep(a == b, constant);
    case nvinfer1::DimensionOperation::kLESS:
      return keep(a < b, constant);
    case nvinfer1::DimensionOperation::kFLOOR_DIV:
      return keep(a / b, constant);
    case nvinfer1::DimensionOperation::kCEIL_DIV:
      return keep((a + b - 1) / b, constant);
  }
  return nullptr;
}

}  // namespace host
