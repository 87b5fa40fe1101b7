// What planners share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/status.h"

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Bytes of a section of a workspace: the next one starts aligned.
inline size_t aligned(int64_t bytes) { return static_cast<size_t>(ceil_div(bytes, 256) * 256); }

// Keeps the message until the thread's next one.
inline Status refuse(const std::string& message) {
  static thread_local std::string kept;
  kept = message;
  return {kept.c_str()};
}
