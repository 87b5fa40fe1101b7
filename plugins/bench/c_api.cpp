// The kernels for callers in other languages, on raw device pointers. Every function returns 0, or 1 with the
// reason in `message`.

#include <cstdio>

#include "kernels/attention.h"
#include "kernels/fast_hadamard.h"
#include "kernels/quantized_linear.h"

#define BENCH_API extern "C" __attribute__((visibility("default")))

BENCH_API int fast_hadamard_plan(const fast_hadamard::Problem* problem, size_t* workspace_bytes,
                                 char* message, size_t capacity) {
  fast_hadamard::Plan plan;
  const Status planned = make_plan(*problem, plan);
  if (!planned) std::snprintf(message, capacity, "%s", planned.message);
  *workspace_bytes = planned ? plan.workspace_bytes : 0;
  return planned ? 0 : 1;
}

BENCH_API int fast_hadamard_run(const fast_hadamard::Problem* problem,
                                const fast_hadamard::Operands* operands, void* stream, char* message,
                                size_t capacity) {
  fast_hadamard::Plan plan;
  Status status = make_plan(*problem, plan);
  if (status) status = run(plan, *operands, stream);
  if (!status) std::snprintf(message, capacity, "%s", status.message);
  return status ? 0 : 1;
}

BENCH_API int quantized_linear_workspace(const quantized_linear::Problem* problem, size_t* workspace_bytes,
                                         char* message, size_t capacity) {
  quantized_linear::Plan plan;
  const Status planned = make_plan(*problem, quantized_linear::multiprocessors(), plan);
  if (!planned) std::snprintf(message, capacity, "%s", planned.message);
  *workspace_bytes = planned ? plan.workspace_bytes : 0;
  return planned ? 0 : 1;
}

BENCH_API int quantized_linear_run(const quantized_linear::Problem* problem,
                                   const quantized_linear::Operands* operands, void* stream, char* message,
                                   size_t capacity) {
  quantized_linear::Plan plan;
  Status status = make_plan(*problem, quantized_linear::multiprocessors(), plan);
  if (status) status = run(plan, *operands, stream);
  if (!status) std::snprintf(message, capacity, "%s", status.message);
  return status ? 0 : 1;
}

BENCH_API int attention_workspace(const sink_window_attention::Problem* problem, size_t* workspace_bytes,
                                  char* message, size_t capacity) {
  sink_window_attention::Plan plan;
  const Status planned = make_plan(*problem, false, plan);  // the same on warpgroups
  if (!planned) std::snprintf(message, capacity, "%s", planned.message);
  *workspace_bytes = planned ? plan.workspace_bytes : 0;
  return planned ? 0 : 1;
}

BENCH_API int attention_has_warpgroups() { return sink_window_attention::has_warpgroups() ? 1 : 0; }

// Whether `on_warpgroups` makes a difference to a problem.
BENCH_API int attention_takes_warpgroups(const sink_window_attention::Problem* problem) {
  sink_window_attention::Plan plan;
  const bool taken = make_plan(*problem, false, plan) && warpgroups_take(plan);
  return taken && sink_window_attention::has_warpgroups() ? 1 : 0;
}

BENCH_API int attention_run(const sink_window_attention::Problem* problem,
                            const sink_window_attention::Operands* operands, int on_warpgroups, void* stream,
                            char* message, size_t capacity) {
  sink_window_attention::Plan plan;
  Status status = make_plan(*problem, false, plan);
  plan.on_warpgroups = on_warpgroups && status && warpgroups_take(plan);
  if (status) status = run(plan, *operands, stream);
  if (!status) std::snprintf(message, capacity, "%s", status.message);
  return status ? 0 : 1;
}
