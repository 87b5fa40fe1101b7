// A fiber: a function on a stack of its own that runs until it yields, then goes on where it stopped.
#pragma once

#include <cstddef>
#include <functional>

#if !defined(__x86_64__) || defined(ROTEXPORT_UCONTEXT_FIBERS)
#  include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  explicit Fiber(size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Forgets whatever ran here and makes `body` the next thing to run. `body` must never return.
  void reset(const std::function<void()>* body);
  // Runs the fiber until it yields.
  void resume();
  // Called inside the fiber: goes back to the caller of resume().
  void yield();

 private:
  static void enter(Fiber* fiber);
#if !defined(__x86_64__) || defined(ROTEXPORT_UCONTEXT_FIBERS)
  static void enter_split(unsigned high, unsigned low);
  ucontext_t context_{}, caller_{};
#else
  void* stack_pointer_ = nullptr;
  void* caller_ = nullptr;
#endif
  void* stack_;
  size_t stack_bytes_;
  const std::function<void()>* body_ = nullptr;
};

}  // namespace emulator
