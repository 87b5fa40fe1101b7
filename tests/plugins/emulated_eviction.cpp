// Runs attention that chooses what stays on the emulator for the Python tests.

#include "emulated_call.h"
#include "kernels/eviction.h"

using namespace eviction;

extern "C" {

// `host` holds host pointers. `in_place` is whether one buffer is cache and updated cache. The output and the
// cache are filled when the result is 0; otherwise `message` says what went wrong.
int emulated_eviction(const Problem* problem, const Operands* host, int in_place, uint64_t schedule,
                      char* message, size_t capacity) {
  static const char* const kNames[kCacheTensors] = {"sink_key",     "sink_value",      "window_key",
                                                    "window_value", "window_position", "window_score"};
  Plan plan;
  const Status planned = make_plan(*problem, plan);
  if (!planned) return report(planned.message, message, capacity);
  try {
    EmulatedCall call(*problem);
    Operands operands{};
    call.upload(*host, operands);
    return call.run(plan, *host, operands, kNames, {in_place != 0, schedule, message, capacity});
  } catch (const emulator::Fault& fault) {
    return report(fault.what(), message, capacity);
  }
}

size_t emulated_eviction_workspace(const Problem* problem, size_t* bytes) {
  Plan plan;
  *bytes = make_plan(*problem, plan) ? plan.workspace_bytes : 0;
  return largest_workspace(*problem);
}
}
