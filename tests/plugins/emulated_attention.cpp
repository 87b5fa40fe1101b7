// Runs sink/window attention on the emulator for the Python tests.

#include "emulated_buffers.h"
#include "kernels/attention.h"

using namespace sink_window_attention;

namespace {

struct HostOperands {
  const void* query;
  const void* query_sink;
  const void* key;
  const void* value;
  const int32_t* past_length;
  const int32_t* new_length;
  const float* decay;
  void* cache[8];  // in the order of Cache; updated
  void* output;
  const void* key_mean;  // this and the two behind it where keys are centered
  const void* mean_query;
  const void* mean_angles;
  const void* signs;  // where queries and keys are rotated
};

struct Size {
  size_t query;
  size_t key;
  size_t value;
  size_t output;
};

Size sizes_of(const Problem& p) {
  const auto rows = static_cast<size_t>(p.batch * p.tokens * 2);
  const auto heads = static_cast<size_t>(p.kv_heads);
  const auto query_heads = static_cast<size_t>(p.query_heads);
  return {rows * query_heads * p.head_size, rows * heads * p.head_size, rows * heads * p.value_size,
          rows * query_heads * p.value_size};
}

void upload_operands(Buffers& buffers, const Problem& p, const HostOperands& host, Operands& operands) {
  const Size size = sizes_of(p);
  const auto batch = static_cast<size_t>(p.batch);
  operands.query = buffers.upload(host.query, size.query, "query");
  operands.query_sink = buffers.upload(host.query_sink, size.query, "query_sink");
  operands.key = buffers.upload(host.key, size.key, "key");
  operands.value = buffers.upload(host.value, size.value, "value");
  operands.past_length = static_cast<int32_t*>(buffers.upload(host.past_length, batch * 4, "past_length"));
  operands.new_length = static_cast<int32_t*>(buffers.upload(host.new_length, batch * 4, "new_length"));
  operands.decay = static_cast<float*>(buffers.upload(host.decay, p.query_heads * sizeof(float), "decay"));
  operands.output = buffers.allocate(size.output, "output");
  if (p.rotated) operands.signs = buffers.upload(host.signs, p.head_size * 2, "signs");
  if (p.angles == 0) return;
  const auto angles = static_cast<size_t>(p.angles) * 2;
  operands.key_mean = buffers.upload(host.key_mean, size.key, "key_mean");
  operands.mean_query =
      buffers.upload(host.mean_query, batch * p.query_heads * p.tokens * angles, "mean_query");
  operands.mean_angles =
      buffers.upload(host.mean_angles, batch * (p.window + p.tokens) * angles, "mean_angles");
}

int run_on_emulator(const Problem* problem, const HostOperands* host, bool on_warpgroups, int in_place,
                    uint64_t schedule, char* message, size_t capacity) {
  static const char* const kNames[8] = {"sink_key",     "sink_value",       "window_key",
                                        "window_value", "window_key_scale", "window_value_scale",
                                        "recent_key",   "recent_value"};
  Plan plan;
  const Status planned = make_plan(*problem, on_warpgroups, plan);
  if (!planned) return report(planned.message, message, capacity);
  plan.on_warpgroups = on_warpgroups && warpgroups_take(plan);  // however small the problem
  size_t bytes[8];
  cache_bytes(*problem, bytes);
  auto& machine = emulator::Machine::instance();
  try {
    Buffers buffers;
    Operands operands{};
    upload_operands(buffers, *problem, *host, operands);
    auto** cache = reinterpret_cast<void**>(&operands.cache);
    auto** present = reinterpret_cast<void**>(&operands.present);
    for (int i = 0; i < 8; ++i) {
      if (bytes[i] == 0) continue;
      cache[i] = buffers.upload(host->cache[i], bytes[i], kNames[i]);
      present[i] = in_place ? cache[i] : buffers.allocate(bytes[i], "present");
    }
    operands.workspace = buffers.allocate(plan.workspace_bytes, "workspace");
    machine.set_schedule(schedule);
    const Status done = run(plan, operands, nullptr);
    machine.set_schedule(0);
    if (!done) return report(done.message, message, capacity);
    machine.download(host->output, operands.output, sizes_of(*problem).output);
    for (int i = 0; i < 8; ++i) {
      if (bytes[i] > 0) machine.download(host->cache[i], present[i], bytes[i]);
    }
  } catch (const emulator::Fault& fault) {
    return report(fault.what(), message, capacity);
  }
  return 0;
}

}  // namespace

extern "C" {

// `in_place` is whether one buffer is cache and updated cache. The output and the cache are filled when the
// result is 0; otherwise `message` says what went wrong.
int emulated_attention(const Problem* problem, const HostOperands* host, int in_place, uint64_t schedule,
                       char* message, size_t capacity) {
  return run_on_emulator(problem, host, false, in_place, schedule, message, capacity);
}

// The same as on Hopper, wherever it has kernels of its own.
int emulated_warpgroup_attention(const Problem* problem, const HostOperands* host, int in_place,
                                 uint64_t schedule, char* message, size_t capacity) {
  return run_on_emulator(problem, host, true, in_place, schedule, message, capacity);
}

// Whether the planner takes warpgroups for a legal problem.
int planned_on_warpgroups(const Problem* problem, int on_hopper) {
  Plan plan;
  return make_plan(*problem, on_hopper != 0, plan) && plan.on_warpgroups;
}

size_t emulated_copied_tiles() { return emulator::Machine::instance().copied_tiles(); }
}
