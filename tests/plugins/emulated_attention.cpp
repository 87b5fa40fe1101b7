// Runs sink/window attention on the emulator for the Python tests.

#include "emulated_call.h"
#include "kernels/attention.h"

using namespace sink_window_attention;

namespace {

// What only some operators take.
void upload_others(EmulatedCall& call, const Problem& p, const Operands& host, Operands& operands) {
  Buffers& buffers = call.buffers;
  const auto batch = static_cast<size_t>(p.batch);
  if (p.rotated) operands.signs = buffers.upload(host.signs, p.head_size * 2, "signs");
  if (p.angles == 0) return;
  operands.key_mean = buffers.upload(host.key_mean, call.row_bytes(p.kv_heads, p.head_size), "key_mean");
  operands.mean_query =
      buffers.upload(host.mean_query, call.row_bytes(p.query_heads, p.angles), "mean_query");
  operands.mean_angles =
      buffers.upload(host.mean_angles, batch * (p.window + p.tokens) * p.angles * 2, "mean_angles");
}

int run_on_emulator(const Problem& problem, const Operands& host, bool on_warpgroups,
                    const CallOptions& options) {
  static const char* const kNames[] = {"sink_key",     "sink_value",       "window_key",
                                       "window_value", "window_key_scale", "window_value_scale",
                                       "recent_key",   "recent_value"};
  Plan plan;
  const Status planned = make_plan(problem, on_warpgroups, plan);
  if (!planned) return report(planned.message, options.message, options.capacity);
  plan.on_warpgroups = on_warpgroups && warpgroups_take(plan);  // however small the problem
  try {
    EmulatedCall call(problem);
    Operands operands{};
    call.upload(host, operands);
    upload_others(call, problem, host, operands);
    return call.run(plan, host, operands, kNames, options);
  } catch (const emulator::Fault& fault) {
    return report(fault.what(), options.message, options.capacity);
  }
}

}  // namespace

extern "C" {

// `host` holds host pointers. `in_place` is whether one buffer is cache and updated cache. The output and the
// cache are filled when the result is 0; otherwise `message` says what went wrong.
int emulated_attention(const Problem* problem, const Operands* host, int in_place, uint64_t schedule,
                       char* message, size_t capacity) {
  return run_on_emulator(*problem, *host, false, {in_place != 0, schedule, message, capacity});
}

// The same as on Hopper, wherever it has kernels of its own.
int emulated_warpgroup_attention(const Problem* problem, const Operands* host, int in_place,
                                 uint64_t schedule, char* message, size_t capacity) {
  return run_on_emulator(*problem, *host, true, {in_place != 0, schedule, message, capacity});
}

// Whether the planner takes warpgroups for a legal problem.
int planned_on_warpgroups(const Problem* problem, int on_hopper) {
  Plan plan;
  return make_plan(*problem, on_hopper != 0, plan) && plan.on_warpgroups;
}

size_t emulated_copied_tiles() { return emulator::Machine::instance().copied_tiles(); }
}
