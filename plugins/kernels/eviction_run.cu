#include "kernels/attention_run.h"
#include "kernels/eviction_launch.h"

namespace eviction {
namespace {

template <class Element, int kSize>
Status run_products(const Plan& plan, const Operands& operands, void* stream) {
  Status status = launch_attend<Element, kSize>(plan, operands, stream);
  if (status && plan.geometry.splits > 1) status = launch_combine<Element>(plan, operands, stream);
  if (!status) return status;
  return plan.few ? launch_recall<Element>(plan, operands, stream)
                  : launch_mass<Element, kSize>(plan, operands, stream);
}

template <class Element>
Status run_element(const Plan& plan, const Operands& operands, void* stream) {
  Status status = for_size(plan.size, [&](auto size) {
    return run_products<Element, decltype(size)::value>(plan, operands, stream);
  });
  if (status) status = launch_choose<Element>(plan, operands, stream);
  // The only launch that writes the cache comes last.
  return status ? launch_store<Element>(plan, operands, stream) : status;
}

}  // namespace

Status run(const Plan& plan, const Operands& operands, void* stream) {
  return run_in_place(plan, operands, stream,
                      [&](auto element) { return run_element<decltype(element)>(plan, operands, stream); });
}

}  // namespace eviction
