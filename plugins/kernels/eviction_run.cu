#include "kernels/device.h"
#include "kernels/eviction_launch.h"

namespace eviction {
namespace {

using Launch = Status (*)(const Plan&, const Operands&, void*);

template <class Element, int kSize>
Status run_products(const Plan& plan, const Operands& operands, void* stream) {
  Status status = launch_attend<Element, kSize>(plan, operands, stream);
  if (status && plan.geometry.splits > 1) status = launch_combine<Element>(plan, operands, stream);
  if (!status) return status;
  return plan.few ? launch_recall<Element>(plan, operands, stream)
                  : launch_mass<Element, kSize>(plan, operands, stream);
}

template <class Element>
Launch products_of(int size) {
  switch (size) {
    case 64:
      return run_products<Element, 64>;
    case 80:
      return run_products<Element, 80>;
    case 96:
      return run_products<Element, 96>;
    case 128:
      return run_products<Element, 128>;
    default:
      return run_products<Element, 256>;
  }
}

template <class Element>
Status run_element(const Plan& plan, const Operands& operands, void* stream) {
  Status status = products_of<Element>(plan.size)(plan, operands, stream);
  if (status) status = launch_choose<Element>(plan, operands, stream);
  // The only launch that writes the cache comes last.
  return status ? launch_store<Element>(plan, operands, stream) : status;
}

// The kernels update a cache in place: one that is to end up elsewhere is copied there first.
Status copy_cache(const Plan& plan, const Operands& operands, void* stream) {
  size_t bytes[kCacheTensors];
  cache_bytes(plan.problem, bytes);
  const auto* from = reinterpret_cast<void* const*>(&operands.cache);
  const auto* to = reinterpret_cast<void* const*>(&operands.present);
  for (int i = 0; i < kCacheTensors; ++i) {
    if (bytes[i] == 0 || from[i] == to[i]) continue;
    const Status copied = device::copy(to[i], from[i], bytes[i], static_cast<device::Stream>(stream));
    if (!copied) return copied;
  }
  return {};
}

}  // namespace

Status run(const Plan& plan, const Operands& operands, void* stream) {
  const Status copied = copy_cache(plan, operands, stream);
  if (!copied || plan.problem.batch == 0 || plan.problem.tokens == 0) return copied;
  switch (plan.problem.type) {
    case Type::kHalf:
      return run_element<device::Half>(plan, operands, stream);
    case Type::kBFloat16:
      return run_element<device::BFloat16>(plan, operands, stream);
  }
  return {"eviction: unknown element type"};
}

}  // namespace eviction
