// A thread of control with its own stack, left and entered by hand.
#pragma once

#if defined(__x86_64__) && !defined(CUDA_HOST_UCONTEXT)

// Saves the callee-saved registers on the stack that is left, and takes those of the one that is entered.
extern "C" void cuda_host_switch(void** left, void* entered);
asm(R"(
.text
.local cuda_host_switch
.type cuda_host_switch, @function
cuda_host_switch:
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
.size cuda_host_switch, . - cuda_host_switch
)");

class Fiber {
 public:
  // At the first switch to it, runs `entry`, which must never return, on the stack that ends at `top`.
  void start(unsigned char*, unsigned char* top, void (*entry)()) {
    void** stack = reinterpret_cast<void**>(top) - 8;
    stack[6] = reinterpret_cast<void*>(entry);  // where the first switch returns to, after six registers
    stack[7] = nullptr;                         // entry's own return address
    stack_ = stack;
  }

  void switch_to(Fiber& other) { cuda_host_switch(&stack_, other.stack_); }

 private:
  void* stack_ = nullptr;
};

#else

#include <ucontext.h>

class Fiber {
 public:
  void start(unsigned char* bottom, unsigned char* top, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom;
    context_.uc_stack.ss_size = top - bottom;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

  void switch_to(Fiber& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

#endif
