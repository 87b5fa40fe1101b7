// Attention that chooses what stays for callers in other languages, on raw device pointers. Every function
// returns 0, or 1 with the reason in `message`.

#include <cstdio>

#include "kernels/eviction.h"

#define BENCH_API extern "C" __attribute__((visibility("default")))

BENCH_API int eviction_workspace(const eviction::Problem* problem, size_t* workspace_bytes, char* message,
                                 size_t capacity) {
  eviction::Plan plan;
  const Status planned = make_plan(*problem, plan);
  if (!planned) std::snprintf(message, capacity, "%s", planned.message);
  *workspace_bytes = planned ? plan.workspace_bytes : 0;
  return planned ? 0 : 1;
}

BENCH_API int eviction_run(const eviction::Problem* problem, const eviction::Operands* operands, void* stream,
                           char* message, size_t capacity) {
  eviction::Plan plan;
  Status status = make_plan(*problem, plan);
  if (status) status = run(plan, *operands, stream);
  if (!status) std::snprintf(message, capacity, "%s", status.message);
  return status ? 0 : 1;
}
