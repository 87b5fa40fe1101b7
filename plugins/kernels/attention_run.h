// How a call of an attention operator runs.
#pragma once

#include <type_traits>

#include "kernels/attention_call.h"
#include "kernels/device.h"

namespace attention {

// The kernels update a cache in place: one that is to end up elsewhere is copied there first.
template <class Problem, class Cache>
Status copy_cache(const Problem& problem, const Cache& cache, const Cache& present, void* stream) {
  constexpr int kTensors = sizeof(Cache) / sizeof(void*);
  size_t bytes[kTensors];
  cache_bytes(problem, bytes);
  const auto* from = reinterpret_cast<void* const*>(&cache);
  const auto* to = reinterpret_cast<void* const*>(&present);
  for (int i = 0; i < kTensors; ++i) {
    if (bytes[i] == 0 || from[i] == to[i]) continue;
    const Status copied = device::copy(to[i], from[i], bytes[i], static_cast<device::Stream>(stream));
    if (!copied) return copied;
  }
  return {};
}

// Calls run(one of kHeadSizes, as a type).
template <class Run>
Status for_size(int size, const Run& run) {
  switch (size) {
    case 64:
      return run(std::integral_constant<int, 64>{});
    case 80:
      return run(std::integral_constant<int, 80>{});
    case 96:
      return run(std::integral_constant<int, 96>{});
    case 128:
      return run(std::integral_constant<int, 128>{});
    case 256:
      return run(std::integral_constant<int, 256>{});
  }
  return {"attention: the plan names a size that was not compiled"};
}

// Calls run(an element of the queries' type) once the cache is where it is to be updated.
template <class Plan, class Operands, class Run>
Status run_in_place(const Plan& plan, const Operands& operands, void* stream, const Run& run) {
  const Status copied = copy_cache(plan.problem, operands.cache, operands.present, stream);
  if (!copied || plan.problem.batch == 0 || plan.problem.tokens == 0) return copied;
  switch (plan.problem.type) {
    case Type::kHalf:
      return run(device::Half{});
    case Type::kBFloat16:
      return run(device::BFloat16{});
  }
  return {"attention: unknown element type"};
}

}  // namespace attention
