// Runs kernels on the emulator for the Python tests: uploads, launches, downloads.

#include "emulated_buffers.h"
#include "emulator/device.h"
#include "kernels/fast_hadamard.h"

extern "C" {

int emulated_plan(const fast_hadamard::Problem* problem, char* message, size_t capacity) {
  fast_hadamard::Plan plan;
  const Status planned = make_plan(*problem, plan);
  return planned ? 0 : report(planned.message, message, capacity);
}

// y and scale are filled when the result is 0; otherwise `message` says what went wrong.
int emulated_fast_hadamard(const fast_hadamard::Problem* problem, const void* x, const void* signs,
                           const int8_t* base, void* y, float* scale, uint64_t schedule, char* message,
                           size_t capacity) {
  using namespace fast_hadamard;
  Plan plan;
  const Status planned = make_plan(*problem, plan);
  if (!planned) return report(planned.message, message, capacity);
  const size_t element = problem->type == Type::kFloat ? 4 : 2;
  const size_t elements = static_cast<size_t>(problem->rows * problem->row);
  const size_t results = problem->output == Output::kSame   ? elements * element
                         : problem->output == Output::kInt8 ? elements
                                                            : elements / 2;
  auto& machine = emulator::Machine::instance();
  try {
    Buffers buffers;
    Operands operands{};
    operands.x = buffers.upload(x, elements * element, "x");
    operands.signs = buffers.upload(signs, problem->row * element, "signs");
    operands.base =
        static_cast<int8_t*>(buffers.upload(base, problem->base_order * problem->base_order, "base"));
    operands.y = buffers.allocate(results, "y");
    operands.scale = static_cast<float*>(buffers.allocate(problem->rows * sizeof(float), "scale"));
    operands.workspace = buffers.allocate(plan.workspace_bytes, "workspace");
    const Status done = run_scheduled(plan, operands, schedule);
    if (!done) return report(done.message, message, capacity);
    machine.download(y, operands.y, results);
    if (problem->output != Output::kSame)
      machine.download(scale, operands.scale, problem->rows * sizeof(float));
  } catch (const emulator::Fault& fault) {
    return report(fault.what(), message, capacity);
  }
  return 0;
}
}
