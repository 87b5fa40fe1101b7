// The kernels for callers in other languages, on raw device pointers. Every function that takes a `message`
// returns 0, or 1 with the reason in it.

#include <cstdio>

#include "kernels/attention.h"
#include "kernels/eviction.h"
#include "kernels/fast_hadamard.h"
#include "kernels/quantized_linear.h"

#define BENCH_API extern "C" __attribute__((visibility("default")))

namespace {

int answer(const Status& status, char* message, size_t capacity) {
  if (!status) std::snprintf(message, capacity, "%s", status.message);
  return status ? 0 : 1;
}

template <class Plan>
int answer(const Status& planned, const Plan& plan, size_t* workspace_bytes, char* message, size_t capacity) {
  *workspace_bytes = planned ? plan.workspace_bytes : 0;
  return answer(planned, message, capacity);
}

template <class Plan, class Operands>
int run_planned(const Status& planned, const Plan& plan, const Operands& operands, void* stream,
                char* message, size_t capacity) {
  return answer(planned ? run(plan, operands, stream) : planned, message, capacity);
}

}  // namespace

BENCH_API int fast_hadamard_plan(const fast_hadamard::Problem* problem, size_t* workspace_bytes,
                                 char* message, size_t capacity) {
  fast_hadamard::Plan plan;
  const Status planned = make_plan(*problem, plan);
  return answer(planned, plan, workspace_bytes, message, capacity);
}

BENCH_API int fast_hadamard_run(const fast_hadamard::Problem* problem,
                                const fast_hadamard::Operands* operands, void* stream, char* message,
                                size_t capacity) {
  fast_hadamard::Plan plan;
  const Status planned = make_plan(*problem, plan);
  return run_planned(planned, plan, *operands, stream, message, capacity);
}

BENCH_API int quantized_linear_workspace(const quantized_linear::Problem* problem, size_t* workspace_bytes,
                                         char* message, size_t capacity) {
  quantized_linear::Plan plan;
  const Status planned = make_plan(*problem, quantized_linear::multiprocessors(), plan);
  return answer(planned, plan, workspace_bytes, message, capacity);
}

BENCH_API int quantized_linear_run(const quantized_linear::Problem* problem,
                                   const quantized_linear::Operands* operands, void* stream, char* message,
                                   size_t capacity) {
  quantized_linear::Plan plan;
  const Status planned = make_plan(*problem, quantized_linear::multiprocessors(), plan);
  return run_planned(planned, plan, *operands, stream, message, capacity);
}

BENCH_API int attention_workspace(const sink_window_attention::Problem* problem, size_t* workspace_bytes,
                                  char* message, size_t capacity) {
  sink_window_attention::Plan plan;
  const Status planned = make_plan(*problem, false, plan);  // the same on warpgroups
  return answer(planned, plan, workspace_bytes, message, capacity);
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
  const Status planned = make_plan(*problem, false, plan);
  plan.on_warpgroups = on_warpgroups && planned && warpgroups_take(plan);
  return run_planned(planned, plan, *operands, stream, message, capacity);
}

BENCH_API int eviction_workspace(const eviction::Problem* problem, size_t* workspace_bytes, char* message,
                                 size_t capacity) {
  eviction::Plan plan;
  const Status planned = make_plan(*problem, plan);
  return answer(planned, plan, workspace_bytes, message, capacity);
}

BENCH_API int eviction_run(const eviction::Problem* problem, const eviction::Operands* operands, void* stream,
                           char* message, size_t capacity) {
  eviction::Plan plan;
  const Status planned = make_plan(*problem, plan);
  return run_planned(planned, plan, *operands, stream, message, capacity);
}
