// The machine: a grid of blocks, one block at a time, its threads as fibers. A fiber runs until its warp or its block must
// meet; then the next lane runs. What a GPU would leave undefined ends the launch with a text (`trap`).
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <vector>

#include "banks.h"
#include "fibers.h"
#include "memory.h"

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kSharedWithoutAsking = 48 * 1024,
                 kSharedAtMost = 227 * 1024;  // CUDA C++ Programming Guide, compute capability 9.0

struct Counters {  // what a launch did, summed over launches; see emulator_counter
    uint64_t blocks, barriers, mma, ldmatrix, copies, global_bytes_read, global_bytes_written;
    uint64_t ldmatrix_conflicts, load_conflicts, store_conflicts,
        copy_conflicts;  // in the banks of shared memory, see banks.h
};

struct Copy {  // one cp.async that has not been waited for
    size_t offset;
    uint8_t data[16];
};

struct Thread {
    Fiber fiber;
    dim3 index;
    uint16_t id;
    std::vector<Copy> copies;     // oldest first
    std::vector<size_t> commits;  // how many of them each committed group has
    size_t uncommitted;
    bool unfenced;  // wrote global memory since its last fence
};

enum Access { kLoad, kStore, kCopy, kAccesses };  // of shared memory, other than ldmatrix

struct Warp {
    uint32_t all;       // lanes that exist
    uint32_t runnable;  // lanes that are not waiting
    uint32_t waiting;   // lanes that have arrived at the collective below
    uint32_t finished;  // lanes that have left the kernel
    uint32_t time;      // counts barriers, see Moment
    const char* what;   // the collective
    int parameter;
    const void* operands[kLanes];
    WarpAccesses accesses[kAccesses][5];  // by kind and by the logarithm of their bytes
};

class Machine {
  public:
    using Perform = void (*)(Machine&, const void* const* operands, int parameter);

    // ---- what device code sees
    Thread& thread() { return *current_; }
    dim3 block_index, block_size, grid_size;
    SharedMemory shared;
    GlobalMemory global;
    Counters counters = {};

    Moment now() const { return {epoch_, warp_of(*current_).time, current_->id}; }

    // An access of the running lane to shared memory, for the counters.
    void count_access(Access kind, size_t offset, size_t bytes) {
        if (bytes <= 16) warp_of(*current_).accesses[kind][__builtin_ctzll(bytes)].add(current_->id % kLanes, offset);
    }

    // The running lane arrives at an instruction of the whole warp, described by `what` and `parameter`. The last of 32
    // performs it for all; `operands` holds what each brought.
    void collective(const char* what, int parameter, const void* operand, Perform perform) {
        Warp& warp = warp_of(*current_);
        const int lane = current_->id % kLanes;
        if (warp.all != ~0u) trap("%s in a warp of fewer than 32 threads", what);
        if (warp.waiting == 0) {
            warp.what = what;
            warp.parameter = parameter;
        } else if (std::strcmp(warp.what, what) != 0 || warp.parameter != parameter) {
            trap("divergence: lane %d of warp %d reaches %s (%d) while lane %d waits at %s (%d)", lane,
                 current_->id / kLanes, what, parameter, first(warp.waiting), warp.what, warp.parameter);
        }
        warp.operands[lane] = operand;
        warp.waiting |= 1u << lane;
        warp.runnable &= ~(1u << lane);
        if (warp.waiting == ~0u) {
            count_conflicts(warp);
            Thread* last = current_;
            perform(*this, warp.operands, parameter);
            current_ = last;
            warp.waiting = 0;
            warp.runnable = ~0u;
        } else {
            leave();
        }
    }

    // What happens next is the doing of this lane of the running warp; for `perform`.
    void act_as(int lane) { current_ = &threads_[size_t(current_->id / kLanes * kLanes + lane)]; }

    void warp_barrier() {
        collective("warp_barrier", 0, nullptr,
                   [](Machine& machine, const void* const*, int) { ++machine.warp_of(*machine.current_).time; });
    }

    void block_barrier() {
        warp_of(*current_).runnable &= ~(1u << current_->id % kLanes);
        leave();
    }

    void thread_fence() {
        current_->unfenced = false;
        unfenced_ = false;  // a fence covers what the thread has seen through the barrier, too
    }

    // Before an atomic operation of the running thread.
    void meet_blocks() {
        bool fenced = !unfenced_;
        for (int id = 0; id < thread_count_; ++id) fenced = fenced && !threads_[size_t(id)].unfenced;
        global.meet(fenced);
    }

    void cp_async_wait(size_t left) {
        Thread& thread = *current_;
        while (thread.commits.size() > left) {
            const size_t count = thread.commits.front();
            for (size_t i = 0; i < count; ++i) shared.land(thread.copies[i].offset, thread.copies[i].data, 16, now());
            thread.copies.erase(thread.copies.begin(), thread.copies.begin() + ptrdiff_t(count));
            thread.commits.erase(thread.commits.begin());
        }
    }

    // ---- what the host sees
    // Runs `body` once per thread of the grid. Returns false after a trap, of this launch or an earlier one.
    bool launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, size_t shared_allowed,
                void (*body)(const void*), const void* arguments) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (error_[0]) return false;
        kernel_ = kernel;
        const uint64_t threads = uint64_t(block.x) * block.y * block.z;
        if (threads == 0 || threads > kMaxThreads || uint64_t(grid.x) * grid.y * grid.z == 0 || grid.y > 65535 ||
            grid.z > 65535)
            return fail("launch of %s: a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads", kernel, grid.x, grid.y,
                        grid.z, block.x, block.y, block.z);
        if (shared_bytes > kSharedAtMost || (shared_bytes > kSharedWithoutAsking && shared_bytes > shared_allowed))
            return fail(
                "launch of %s: %zu bytes of shared memory, but %zu without "
                "cudaFuncAttributeMaxDynamicSharedMemorySize, here "
                "%zu, and %zu at most",
                kernel, shared_bytes, kSharedWithoutAsking, shared_allowed, kSharedAtMost);
        grid_size = grid;
        block_size = block;
        body_ = body;
        arguments_ = arguments;
        thread_count_ = int(threads);
        for (uint64_t i = 0, count = uint64_t(grid.x) * grid.y * grid.z; i < count && !error_[0]; ++i) {
            const uint64_t at = block_order_ ? count - 1 - i : i;
            block_index = dim3(unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y));
            try {
                run_block(shared_bytes);
            } catch (const Trapped&) {
            }
            current_ = nullptr;
        }
        global.end_launch();
        return !error_[0];
    }

    std::mutex& mutex() { return mutex_; }
    const char* error() const { return error_; }
    void clear_error() { error_[0] = 0; }
    void set_block_order(int order) { block_order_ = order; }

    [[noreturn]] void end_launch(const char* format, va_list arguments) {
        int length = std::snprintf(error_, sizeof(error_), "%.300s, block (%u, %u, %u)", kernel_, block_index.x,
                                   block_index.y, block_index.z);
        if (current_)
            length += std::snprintf(error_ + length, sizeof(error_) - size_t(length), ", thread %d", current_->id);
        length += std::snprintf(error_ + length, sizeof(error_) - size_t(length), ": ");
        std::vsnprintf(error_ + length, sizeof(error_) - size_t(length), format, arguments);
        if (!current_) throw Trapped();  // between threads, caught in `launch`
        Fiber abandoned;
        scheduler_.enter(abandoned);
        __builtin_unreachable();
    }

  private:
    Warp& warp_of(const Thread& thread) { return warps_[thread.id / kLanes]; }
    const Warp& warp_of(const Thread& thread) const { return warps_[thread.id / kLanes]; }
    static int first(uint32_t lanes) { return __builtin_ctz(lanes); }

    bool fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(error_, sizeof(error_), format, arguments);
        va_end(arguments);
        return false;
    }

    struct Trapped {};

    static void thread_main();

    void run_block(size_t shared_bytes) {
        shared.begin_block(shared_bytes);
        global.begin_block(block_index.x + grid_size.x * (block_index.y + grid_size.y * block_index.z));
        unfenced_ = false;
        ++counters.blocks;
        if (threads_.size() < kMaxThreads) threads_.resize(kMaxThreads);
        stacks_.reserve(thread_count_);
        warps_.assign(size_t((thread_count_ + kLanes - 1) / kLanes), Warp{});
        for (int id = 0; id < thread_count_; ++id) {
            Thread& thread = threads_[size_t(id)];
            const unsigned at = unsigned(id);
            thread.index = dim3(at % block_size.x, at / block_size.x % block_size.y, at / block_size.x / block_size.y);
            thread.id = uint16_t(id);
            thread.copies.clear();
            thread.commits.clear();
            thread.uncommitted = 0;
            thread.unfenced = false;
            thread.fiber.start(stacks_.get(id), Stacks::kBytes, thread_main);
            warp_of(thread).all |= 1u << id % kLanes;
        }
        for (bool running = true; running;) {  // from one barrier of the block to the next
            ++epoch_;
            for (size_t w = 0; w < warps_.size(); ++w) {
                warps_[w].runnable = warps_[w].all;
                ++warps_[w].time;
                current_ = &threads_[w * kLanes];
                current_->fiber.enter(scheduler_);
                if (error_[0]) return;
                count_conflicts(warps_[w]);
            }
            current_ = nullptr;
            running = all_meet();
        }
        shared.end_block();
    }

    void count_conflicts(Warp& warp) {
        uint64_t* const counts[kAccesses] = {&counters.load_conflicts, &counters.store_conflicts,
                                             &counters.copy_conflicts};
        for (int kind = 0; kind < kAccesses; ++kind)
            for (int log = 0; log < 5; ++log)
                *counts[kind] += warp.accesses[kind][log].take_conflicts(size_t(1) << log);
    }

    // Every thread waits at block_barrier or has left the kernel. True when all wait, false when all have left.
    bool all_meet() {
        int left = -1, waits = -1;
        for (int id = 0; id < thread_count_; ++id)
            (warps_[size_t(id / kLanes)].finished >> id % kLanes & 1 ? left : waits) = id;
        if (left >= 0 && waits >= 0)
            trap("block_barrier: thread %d waits, but thread %d has left the kernel", waits, left);
        for (int id = 0; id < thread_count_; ++id) {
            unfenced_ = unfenced_ || threads_[size_t(id)].unfenced;
            threads_[size_t(id)].unfenced = false;
        }
        counters.barriers += waits >= 0;
        return waits >= 0;
    }

    // The running lane has to wait: the next runnable lane of the warp goes on, or the scheduler.
    void leave() {
        Thread& from = *current_;
        Warp& warp = warp_of(from);
        if (warp.runnable == 0) {
            if (warp.waiting) {
                const int missing = first(warp.all & ~warp.waiting);
                trap("divergence: lane %d of warp %d waits at %s, but lane %d %s", first(warp.waiting),
                     from.id / kLanes, warp.what, missing,
                     warp.finished >> missing & 1 ? "has left the kernel" : "waits at block_barrier");
            }
            scheduler_.enter(from.fiber);
        } else {
            const int lane = from.id % kLanes;
            const uint32_t later = lane == kLanes - 1 ? 0 : warp.runnable & (~0u << (lane + 1));
            Thread& to = threads_[from.id / kLanes * kLanes + first(later ? later : warp.runnable)];
            current_ = &to;
            to.fiber.enter(from.fiber);
        }
    }

    std::mutex mutex_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    Stacks stacks_;
    Fiber scheduler_;
    Thread* current_ = nullptr;
    int thread_count_ = 0;
    uint32_t epoch_ = 0;
    bool unfenced_ = false;  // the block wrote global memory before its last barrier and did not fence since
    int block_order_ = 0;
    const char* kernel_ = "";
    void (*body_)(const void*) = nullptr;
    const void* arguments_ = nullptr;
    char error_[1024] = "";
};

// Of this library alone: an inline variable would be shared by all libraries of a process that include this file.
static Machine the_machine;

inline Machine& machine() { return the_machine; }

inline void Machine::thread_main() {
    Machine& m = machine();
    m.body_(m.arguments_);
    Warp& warp = m.warp_of(*m.current_);
    const uint32_t lane = 1u << m.current_->id % kLanes;
    warp.finished |= lane;
    warp.runnable &= ~lane;
    m.leave();
    __builtin_unreachable();
}

[[noreturn]] inline void trap(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    machine().end_launch(format, arguments);
}

}  // namespace emulator
