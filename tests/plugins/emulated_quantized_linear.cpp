// Runs QuantizedLinear on the emulator for the Python tests.

#include "emulated_buffers.h"
#include "emulator/device.h"
#include "kernels/quantized_linear.h"

namespace {

using namespace quantized_linear;

size_t bytes_of(int64_t elements, int bits) { return static_cast<size_t>(elements * bits / 8); }

}  // namespace

extern "C" {

int emulated_quantized_linear_plan(const Problem* problem, unsigned multiprocessors, Plan* plan,
                                   size_t* largest, char* message, size_t capacity) {
  const Status planned = make_plan(*problem, multiprocessors, *plan);
  *largest = planned ? largest_workspace(*problem, multiprocessors) : 0;
  return planned ? 0 : report(planned.message, message, capacity);
}

// `host` holds host pointers; y is filled when the result is 0, otherwise `message` says what went wrong.
int emulated_quantized_linear(const Problem* problem, unsigned multiprocessors, const Operands* host, void* y,
                              uint64_t schedule, char* message, size_t capacity) {
  const Problem& p = *problem;
  Plan plan;
  const Status planned = make_plan(p, multiprocessors, plan);
  if (!planned) return report(planned.message, message, capacity);
  const int64_t results = p.rows * p.outputs;
  const int y_bits = p.type == Type::kFloat ? 32 : 16;
  const int64_t scale_rows = p.two_level ? 1 : p.groups;
  auto& machine = emulator::Machine::instance();
  try {
    Buffers buffers;
    const auto floats = [&](const float* from, int64_t count, const char* name) {
      return from ? static_cast<const float*>(buffers.upload(from, bytes_of(count, 32), name)) : nullptr;
    };
    const auto bytes = [&](const int8_t* from, int64_t count, int bits, const char* name) {
      return from ? static_cast<const int8_t*>(buffers.upload(from, bytes_of(count, bits), name)) : nullptr;
    };
    Operands operands{};
    operands.x = bytes(host->x, p.rows * p.inputs, p.format == Format::kW4A4 ? 4 : 8, "x");
    operands.x_scale = floats(host->x_scale, p.rows * p.row_scales, "x_scale");
    operands.x_zero = floats(host->x_zero, p.rows, "x_zero");
    operands.weight =
        bytes(host->weight, p.outputs * p.group * p.groups, p.format == Format::kW8A8 ? 8 : 4, "weight");
    operands.factors = bytes(host->factors, p.groups * p.outputs, 8, "factors");
    operands.weight_scale = floats(host->weight_scale, scale_rows * p.outputs, "weight_scale");
    operands.weight_sum = floats(host->weight_sum, p.outputs, "weight_sum");
    operands.bias = floats(host->bias, p.outputs, "bias");
    if (p.ending != Ending::kNone)
      operands.other = buffers.upload(host->other, bytes_of(results, y_bits), "other");
    operands.y = buffers.allocate(bytes_of(results, y_bits), "y");
    operands.workspace = buffers.allocate(plan.workspace_bytes, "workspace");
    const Status done = run_scheduled(plan, operands, schedule);
    if (!done) return report(done.message, message, capacity);
    machine.download(y, operands.y, bytes_of(results, y_bits));
  } catch (const emulator::Fault& fault) {
    return report(fault.what(), message, capacity);
  }
  return 0;
}
}
