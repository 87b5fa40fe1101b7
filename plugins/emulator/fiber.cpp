#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace emulator {

Fiber::Fiber(size_t stack_bytes) : stack_bytes_(stack_bytes) {
  // Pages are taken when touched, so a generous stack costs nothing until a kernel needs it.
  stack_ =
      mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack_, 4096, PROT_NONE);  // an overflow faults instead of reaching the next stack
}

Fiber::~Fiber() { munmap(stack_, stack_bytes_); }

void Fiber::enter(Fiber* fiber) {
  (*fiber->body_)();
  std::abort();
}

#if !defined(__x86_64__) || defined(ROTEXPORT_UCONTEXT_FIBERS)

void Fiber::enter_split(unsigned high, unsigned low) {
  enter(reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low));
}

void Fiber::reset(const std::function<void()>* body) {
  body_ = body;
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  const uintptr_t self = reinterpret_cast<uintptr_t>(this);
  makecontext(&context_, reinterpret_cast<void (*)()>(enter_split), 2, static_cast<unsigned>(self >> 32),
              static_cast<unsigned>(self));
}

void Fiber::resume() { swapcontext(&caller_, &context_); }
void Fiber::yield() { swapcontext(&context_, &caller_); }

#else

// Saves the callee-saved registers of the System V ABI on the stack, then continues on the other stack.
extern "C" void rotexport_switch_stack(void** save, void* load);
extern "C" void rotexport_start_fiber();
asm(R"(
.text
.globl rotexport_switch_stack
.hidden rotexport_switch_stack
.type rotexport_switch_stack, @function
rotexport_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size rotexport_switch_stack, .-rotexport_switch_stack
.globl rotexport_start_fiber
.hidden rotexport_start_fiber
.type rotexport_start_fiber, @function
rotexport_start_fiber:
  mov %r12, %rdi
  jmp *%r13
.size rotexport_start_fiber, .-rotexport_start_fiber
)");

void Fiber::reset(const std::function<void()>* body) {
  body_ = body;
  // As if rotexport_switch_stack had just been called by rotexport_start_fiber: r15 r14 r13 r12 rbx rbp,
  // return.
  auto* top = reinterpret_cast<void**>(static_cast<char*>(stack_) + stack_bytes_);
  *--top = nullptr;  // keeps the stack 16-byte aligned where `enter` expects its return address
  *--top = reinterpret_cast<void*>(&rotexport_start_fiber);
  *--top = nullptr;                                 // rbp
  *--top = nullptr;                                 // rbx
  *--top = this;                                    // r12: the argument of enter
  *--top = reinterpret_cast<void*>(&Fiber::enter);  // r13
  *--top = nullptr;                                 // r14
  *--top = nullptr;                                 // r15
  stack_pointer_ = top;
}

void Fiber::resume() { rotexport_switch_stack(&caller_, stack_pointer_); }
void Fiber::yield() { rotexport_switch_stack(&stack_pointer_, caller_); }

#endif

}  // namespace emulator
