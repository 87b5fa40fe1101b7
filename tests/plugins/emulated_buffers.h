// What the tests' C functions share: device memory for one call, its launch, and error messages.
#pragma once

#include <cstdio>
#include <vector>

#include "emulator/machine.h"
#include "kernels/status.h"

// Device memory that lives as long as one call.
class Buffers {
 public:
  ~Buffers() {
    for (void* buffer : buffers_) emulator::Machine::instance().release(buffer);
  }
  void* allocate(size_t bytes, const char* name) {
    buffers_.push_back(emulator::Machine::instance().allocate(bytes, name));
    return buffers_.back();
  }
  void* upload(const void* from, size_t bytes, const char* name) {
    void* buffer = allocate(bytes, name);
    emulator::Machine::instance().upload(buffer, from, bytes);
    return buffer;
  }

 private:
  std::vector<void*> buffers_;
};

template <class Plan, class Operands>
Status run_scheduled(const Plan& plan, const Operands& operands, uint64_t schedule) {
  emulator::Machine::instance().set_schedule(schedule);
  const Status done = run(plan, operands, nullptr);
  emulator::Machine::instance().set_schedule(0);
  return done;
}

inline int report(const char* text, char* message, size_t capacity) {
  std::snprintf(message, capacity, "%s", text);
  return 1;
}
