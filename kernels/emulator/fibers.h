// Threads of a block as fibers: each has a stack, one runs at a time, and a switch costs a few nanoseconds.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || defined(SPARSIFY_EMULATOR_UCONTEXT)
#include <ucontext.h>
#define SPARSIFY_EMULATOR_UCONTEXT_FIBERS
#else
// Keeps what the System V ABI wants kept, on the stack that is left, and takes it from the stack that is entered.
extern "C" void sparsify_emulator_switch(void** left, void* entered) __attribute__((visibility("hidden")));
asm(".text\n"
    ".p2align 4\n"
    ".type sparsify_emulator_switch, @function\n"
    "sparsify_emulator_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n"
    ".size sparsify_emulator_switch, .-sparsify_emulator_switch\n");
#endif

namespace emulator {

// A suspended computation. `start` makes one that will call `entry` (which never returns); `enter` suspends the running
// one into `from` and goes on with `this`.
class Fiber {
  public:
#ifdef SPARSIFY_EMULATOR_UCONTEXT_FIBERS
    void start(uint8_t* stack, size_t bytes, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = bytes;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    void enter(Fiber& from) { swapcontext(&from.context_, &context_); }

  private:
    ucontext_t context_;
#else
    void start(uint8_t* stack, size_t bytes, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + bytes);  // aligned to 16
        *--top = nullptr;                                      // where `entry` would return to
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        stack_pointer_ = top;
    }
    void enter(Fiber& from) { sparsify_emulator_switch(&from.stack_pointer_, stack_pointer_); }

  private:
    void* stack_pointer_ = nullptr;
#endif
};

// Stacks for the threads of one block, mapped once; an unmapped page below each stops a stack that grows too far.
class Stacks {
  public:
    static constexpr size_t kBytes = 256 * 1024;

    // Before the first fiber of a block is started: mapping more moves those that are there.
    void reserve(int count) {
        if (count > count_) grow(count);
    }
    uint8_t* get(int index) const { return base_ + size_t(index) * stride() + guard(); }
    ~Stacks() { release(); }

  private:
    static size_t guard() { return size_t(sysconf(_SC_PAGESIZE)); }
    static size_t stride() { return kBytes + guard(); }
    void release() {
        if (base_) munmap(base_, size_t(count_) * stride());
        base_ = nullptr;
    }
    void grow(int count) {
        release();
        count_ = (count + 255) / 256 * 256;
        void* memory = mmap(nullptr, size_t(count_) * stride(), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            std::perror("emulator: no memory for the stacks of a block");
            std::abort();
        }
        base_ = static_cast<uint8_t*>(memory);
        for (int i = 0; i < count_; ++i) mprotect(base_ + size_t(i) * stride(), guard(), PROT_NONE);
    }

    uint8_t* base_ = nullptr;
    int count_ = 0;
};

}  // namespace emulator
