// Runs a call of an attention operator on the emulator.
#pragma once

#include "emulated_buffers.h"
#include "kernels/attention_call.h"

// How a call is to run, and room to say what went wrong.
struct CallOptions {
  bool in_place;  // whether one buffer is cache and updated cache
  uint64_t schedule;
  char* message;
  size_t capacity;
};

class EmulatedCall {
 public:
  explicit EmulatedCall(const attention::Sizes& sizes) : s_(sizes) {}

  size_t row_bytes(int64_t heads, int64_t size) const {
    return static_cast<size_t>(s_.batch * heads * s_.tokens * size * 2);
  }

  // Uploads what all operators take, and makes room for the output.
  void upload(const attention::CallOperands& host, attention::CallOperands& operands) {
    const auto batch = static_cast<size_t>(s_.batch);
    const size_t query = row_bytes(s_.query_heads, s_.head_size);
    operands.query = buffers.upload(host.query, query, "query");
    operands.query_sink = buffers.upload(host.query_sink, query, "query_sink");
    operands.key = buffers.upload(host.key, row_bytes(s_.kv_heads, s_.head_size), "key");
    operands.value = buffers.upload(host.value, row_bytes(s_.kv_heads, s_.value_size), "value");
    operands.past_length = static_cast<int32_t*>(buffers.upload(host.past_length, batch * 4, "past_length"));
    operands.new_length = static_cast<int32_t*>(buffers.upload(host.new_length, batch * 4, "new_length"));
    operands.decay = static_cast<float*>(buffers.upload(host.decay, s_.query_heads * sizeof(float), "decay"));
    operands.output = buffers.allocate(row_bytes(s_.query_heads, s_.value_size), "output");
  }

  // Runs a plan of operands, of which the cache is uploaded here: `host` holds host pointers, whose output
  // and cache are filled when the result is 0.
  template <class Plan, class Operands>
  int run(const Plan& plan, const Operands& host, Operands& operands, const char* const* names,
          const CallOptions& options) {
    using Cache = decltype(host.cache);
    constexpr int kTensors = sizeof(Cache) / sizeof(void*);
    size_t bytes[kTensors];
    cache_bytes(plan.problem, bytes);
    const auto* held = reinterpret_cast<void* const*>(&host.cache);
    auto** cache = reinterpret_cast<void**>(&operands.cache);
    auto** present = reinterpret_cast<void**>(&operands.present);
    for (int i = 0; i < kTensors; ++i) {
      if (bytes[i] == 0) continue;
      cache[i] = buffers.upload(held[i], bytes[i], names[i]);
      present[i] = options.in_place ? cache[i] : buffers.allocate(bytes[i], "present");
    }
    operands.workspace = buffers.allocate(plan.workspace_bytes, "workspace");
    const Status done = run_scheduled(plan, operands, options.schedule);
    if (!done) return report(done.message, options.message, options.capacity);
    auto& machine = emulator::Machine::instance();
    machine.download(host.output, operands.output, row_bytes(s_.query_heads, s_.value_size));
    for (int i = 0; i < kTensors; ++i) {
      if (bytes[i] > 0) machine.download(held[i], present[i], bytes[i]);
    }
    return 0;
  }

  Buffers buffers;

 private:
  const attention::Sizes& s_;
};
