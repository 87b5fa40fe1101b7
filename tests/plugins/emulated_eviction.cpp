// Runs attention that chooses what stays on the emulator for the Python tests.

#include "emulated_buffers.h"
#include "kernels/eviction.h"

using namespace eviction;

namespace {

struct HostOperands {
  const void* query;
  const void* query_sink;
  const void* key;
  const void* value;
  const int32_t* past_length;
  const int32_t* new_length;
  const float* decay;
  void* cache[kCacheTensors];  // in the order of Cache; updated
  void* output;
};

size_t row_bytes(const Problem& p, int64_t heads, int64_t size) {
  return static_cast<size_t>(p.batch * heads * p.tokens * size * 2);
}

void upload_operands(Buffers& buffers, const Problem& p, const HostOperands& host, Operands& operands) {
  const auto batch = static_cast<size_t>(p.batch);
  const size_t query = row_bytes(p, p.query_heads, p.head_size);
  operands.query = buffers.upload(host.query, query, "query");
  operands.query_sink = buffers.upload(host.query_sink, query, "query_sink");
  operands.key = buffers.upload(host.key, row_bytes(p, p.kv_heads, p.head_size), "key");
  operands.value = buffers.upload(host.value, row_bytes(p, p.kv_heads, p.value_size), "value");
  operands.past_length = static_cast<int32_t*>(buffers.upload(host.past_length, batch * 4, "past_length"));
  operands.new_length = static_cast<int32_t*>(buffers.upload(host.new_length, batch * 4, "new_length"));
  operands.decay = static_cast<float*>(buffers.upload(host.decay, p.query_heads * sizeof(float), "decay"));
  operands.output = buffers.allocate(row_bytes(p, p.query_heads, p.value_size), "output");
}

}  // namespace

extern "C" {

// `in_place` is whether one buffer is cache and updated cache. The output and the cache are filled when the
// result is 0; otherwise `message` says what went wrong.
int emulated_eviction(const Problem* problem, const HostOperands* host, int in_place, uint64_t schedule,
                      char* message, size_t capacity) {
  static const char* const kNames[kCacheTensors] = {"sink_key",     "sink_value",      "window_key",
                                                    "window_value", "window_position", "window_score"};
  Plan plan;
  const Status planned = make_plan(*problem, plan);
  if (!planned) return report(planned.message, message, capacity);
  size_t bytes[kCacheTensors];
  cache_bytes(*problem, bytes);
  auto& machine = emulator::Machine::instance();
  try {
    Buffers buffers;
    Operands operands{};
    upload_operands(buffers, *problem, *host, operands);
    auto** cache = reinterpret_cast<void**>(&operands.cache);
    auto** present = reinterpret_cast<void**>(&operands.present);
    for (int i = 0; i < kCacheTensors; ++i) {
      cache[i] = buffers.upload(host->cache[i], bytes[i], kNames[i]);
      present[i] = in_place ? cache[i] : buffers.allocate(bytes[i], "present");
    }
    operands.workspace = buffers.allocate(plan.workspace_bytes, "workspace");
    machine.set_schedule(schedule);
    const Status done = run(plan, operands, nullptr);
    machine.set_schedule(0);
    if (!done) return report(done.message, message, capacity);
    machine.download(host->output, operands.output,
                     row_bytes(*problem, problem->query_heads, problem->value_size));
    for (int i = 0; i < kCacheTensors; ++i) machine.download(host->cache[i], present[i], bytes[i]);
  } catch (const emulator::Fault& fault) {
    return report(fault.what(), message, capacity);
  }
  return 0;
}

size_t emulated_eviction_workspace(const Problem* problem, size_t* bytes) {
  Plan plan;
  *bytes = make_plan(*problem, plan) ? plan.workspace_bytes : 0;
  return largest_workspace(*problem);
}
}
