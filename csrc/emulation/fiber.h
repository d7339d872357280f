// Switching between stacks.
#pragma once

#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>

#include <cstddef>
#endif

namespace mimkernels::emulation {

#if defined(__x86_64__)

// Saves where this code is in *from and goes on where `to` was saved. What a call may not change is
// kept; the kernels do not touch the rounding mode.
void switch_stack(void** from, void* to) __asm__("mimkernels_emulation_switch_stack");

__asm__(R"(
  .text
  .weak mimkernels_emulation_switch_stack
  .hidden mimkernels_emulation_switch_stack
  .type mimkernels_emulation_switch_stack, @function
mimkernels_emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size mimkernels_emulation_switch_stack, .-mimkernels_emulation_switch_stack
)");

// A stack that ends at `end` and starts in `entry`, which never returns.
inline void* new_stack(unsigned char* end, void (*entry)()) {
  uint64_t* const top = reinterpret_cast<uint64_t*>(end) - 8;
  top[6] = reinterpret_cast<uint64_t>(entry);
  top[7] = 0;  // the return address of entry: none
  return top;
}

#else

// A context lies at the end of its own stack; the scheduler's is the variable below.
inline void switch_stack(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

inline void* new_stack(unsigned char* end, void (*entry)()) {
  constexpr size_t kStackBytes = 256 * 1024 - 4096 - sizeof(ucontext_t) - 64;
  ucontext_t* const context = reinterpret_cast<ucontext_t*>(end - sizeof(ucontext_t) - 32);
  getcontext(context);
  context->uc_stack.ss_sp = reinterpret_cast<unsigned char*>(context) - kStackBytes;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

#endif

}  // namespace mimkernels::emulation
