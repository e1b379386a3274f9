// A stack of its own for every CUDA thread, and the switch from one to another.
//
// Our own switch saves six registers and takes some 10 ns; ucontext, which also saves the signal mask by a system
// call, takes 300 ns and serves the other processors.
#pragma once
#include <stdint.h>
#include <sys/mman.h>

#include <new>

#include "sanitizer.h"

#if !defined(__x86_64__) || defined(D2V_ENGINE_UCONTEXT)
#define D2V_ENGINE_PORTABLE 1
#include <ucontext.h>
#endif

namespace d2v::engine {

inline constexpr size_t kStackBytes = 256 * 1024;
inline constexpr size_t kPageBytes = 4096;

// Never moves and keeps its stack: sanitizers hold on to addresses in it.
struct Fiber {
#if defined(D2V_ENGINE_PORTABLE)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  void* stack = nullptr;  // lowest usable address; null for the thread that launches
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;    // AddressSanitizer's
  void* thread_state = nullptr;  // ThreadSanitizer's
};

inline void allocate_stack(Fiber& fiber) {
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kStackBytes + kPageBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kPageBytes, PROT_NONE);  // a stack that overflows stops here
  fiber.stack = static_cast<char*>(memory) + kPageBytes;
  fiber.stack_bytes = kStackBytes;
}

// Gives up whatever the fiber was doing.
inline void renew_sanitizer_state(Fiber& fiber) {
#if defined(__SANITIZE_THREAD__)
  fiber.thread_state = __tsan_create_fiber(0);
#endif
  allow(fiber.stack, fiber.stack_bytes);
}

// The next switch to the fiber calls `entry`, which must not return.
inline void prepare(Fiber& fiber, void (*entry)()) {
#if defined(D2V_ENGINE_PORTABLE)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + fiber.stack_bytes);
  *--top = nullptr;                         // aligns the frame of entry as a call would
  *--top = reinterpret_cast<void*>(entry);  // where the switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

#if !defined(D2V_ENGINE_PORTABLE)
// noipa: from the asm alone g++ would conclude that the call changes no memory.
__attribute__((naked, noipa, no_sanitize("thread"), no_sanitize("address"))) inline void swap_stacks(void** /*save*/,
                                                                                                     void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline thread_local Fiber* left_fiber = nullptr;  // the one that the running one was switched from

// After arriving on a stack: `fake_stack` is the arriving fiber's own, null on its first run.
__attribute__((no_sanitize("thread"))) inline void finish_switch([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  // Also learns the bounds of the launching thread's stack, which nobody else tells us.
  __sanitizer_finish_switch_fiber(fake_stack, const_cast<const void**>(&left_fiber->stack), &left_fiber->stack_bytes);
#endif
}

// Not instrumented: past __tsan_switch_to_fiber this already counts as the other fiber.
__attribute__((noinline, no_sanitize("thread"))) inline void switch_fibers(Fiber& from, Fiber& to) {
  left_fiber = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if !defined(D2V_ENGINE_PORTABLE)
  void* const load = to.stack_pointer;
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.thread_state, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(D2V_ENGINE_PORTABLE)
  swapcontext(&from.context, &to.context);
#else
  swap_stacks(&from.stack_pointer, load);
#endif
  finish_switch(from.fake_stack);
}

}  // namespace d2v::engine
