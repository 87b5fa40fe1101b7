// What the tests' C functions share: device memory for one call, and error messages.
#pragma once

#include <cstdio>
#include <vector>

#include "emulator/machine.h"

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

inline int report(const char* text, char* message, size_t capacity) {
  std::snprintf(message, capacity, "%s", text);
  return 1;
}
