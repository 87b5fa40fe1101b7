#include "kernels/device.h"
#include "kernels/fast_hadamard_launch.h"

namespace fast_hadamard {
namespace {

template <class Element>
Status run_with(const Plan& plan, const Operands& operands, void* stream) {
  switch (plan.problem.output) {
    case Output::kSame:
      return launch<Element, Output::kSame>(plan, operands, stream);
    case Output::kInt8:
      return launch<Element, Output::kInt8>(plan, operands, stream);
    case Output::kInt4:
      return launch<Element, Output::kInt4>(plan, operands, stream);
  }
  return {"FastHadamard: unknown output"};
}

}  // namespace

Status run(const Plan& plan, const Operands& operands, void* stream) {
  if (plan.geometry.elements == 0) return {};
  switch (plan.problem.type) {
    case Type::kHalf:
      return run_with<device::Half>(plan, operands, stream);
    case Type::kBFloat16:
      return run_with<device::BFloat16>(plan, operands, stream);
    case Type::kFloat:
      return run_with<float>(plan, operands, stream);
  }
  return {"FastHadamard: unknown element type"};
}

}  // namespace fast_hadamard
