// Decides for Hopper's warpgroup instructions, and chooses the unit.

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "kernels/quantized_linear_hopper.h"

namespace quantized_linear {
namespace {

constexpr int kHopper = 9;
constexpr int kAlignedOutputs = 8;  // rows of y begin at multiples of 16 bytes

bool on_hopper() {
  int id = 0;
  int major = 0;
  if (cudaGetDevice(&id) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id) != cudaSuccess) return false;
  return major == kHopper;
}

}  // namespace

bool hopper_takes(const Plan& plan) {
  const Problem& p = plan.problem;
  return p.format == Format::kW8A8 && plan.scales == Scales::kChannel && !p.asymmetric && !plan.decodes &&
         p.type != Type::kFloat && plan.geometry.splits == 1 && p.outputs % kAlignedOutputs == 0 &&
         on_hopper();
}

Status run_hopper(const Plan& plan, const Operands& operands, void* stream) {
  const bool ends = plan.problem.ending != Ending::kNone;
  if (plan.problem.type == Type::kHalf) {
    return ends ? launch_hopper<cutlass::half_t, true>(plan, operands, stream)
                : launch_hopper<cutlass::half_t, false>(plan, operands, stream);
  }
  return ends ? launch_hopper<cutlass::bfloat16_t, true>(plan, operands, stream)
              : launch_hopper<cutlass::bfloat16_t, false>(plan, operands, stream);
}

}  // namespace quantized_linear
