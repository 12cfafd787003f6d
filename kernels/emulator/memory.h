// Memory that knows what was done to it. Shared memory: every byte remembers who wrote and who read it last and between
// which barriers, so that two accesses by different threads of which one writes, with no barrier in between, are found in
// whatever order the fibers ran. Global memory: only registered ranges, each byte initialised or not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace emulator {

[[noreturn]] void trap(const char* format, ...) __attribute__((format(printf, 1, 2)));

constexpr uint16_t kPoison = 0x7fa5;  // repeated: a NaN as bf16, fp16, fp32 and fp64

// Who runs and when, as far as memory is concerned. `epoch` counts the barriers of the block (and never starts again), so
// accesses of different epochs are ordered; `warp_time` counts the barriers of the thread's warp, of either kind.
struct Moment {
    uint32_t epoch, warp_time;
    uint16_t thread;
    uint16_t warp() const { return thread / 32; }
};

class SharedMemory {
  public:
    static constexpr size_t kGuard = 4096, kAlignment = 1024;

    // A block begins: `bytes` of memory that nobody has written. Zones before and behind them show stray writes.
    void begin_block(size_t bytes) {
        bytes_ = bytes;
        const size_t need = bytes + 2 * kGuard + kAlignment;
        if (storage_.size() < need) storage_.resize(need);
        if (shadow_.size() < bytes) shadow_.resize(bytes);
        const uintptr_t start = reinterpret_cast<uintptr_t>(storage_.data()) + kGuard;
        base_ = reinterpret_cast<uint8_t*>((start + kAlignment - 1) / kAlignment * kAlignment);
        poison(base_ - kGuard, bytes + 2 * kGuard);
        for (size_t i = 0; i < bytes; ++i) shadow_[i].state = kEmpty;
    }

    // What raw pointers did behind our back.
    void end_block() const {
        for (size_t i = 0; i < kGuard; i += 2) {
            if (!is_poison(base_ - kGuard + i))
                trap("shared memory was written %zu bytes before its begin", kGuard - i);
            const uint8_t* behind = base_ + (bytes_ + 1) / 2 * 2 + i;
            if (behind + 2 <= base_ + bytes_ + kGuard && !is_poison(behind))
                trap("shared memory was written %zu bytes behind its end (%zu bytes)", size_t(behind - base_) - bytes_,
                     bytes_);
        }
        for (size_t i = 0; i + 1 < bytes_; i += 2)
            if (shadow_[i].state == kEmpty && shadow_[i + 1].state == kEmpty && !is_poison(base_ + i))
                trap("byte %zu of shared memory was written without shared_store or cp_async_16", i);
    }

    uint8_t* base() const { return base_; }
    size_t bytes() const { return bytes_; }

    // The offset of an access, which must lie inside and be aligned.
    size_t locate(const char* what, const void* pointer, size_t size, size_t alignment) const {
        const ptrdiff_t offset = reinterpret_cast<intptr_t>(pointer) - reinterpret_cast<intptr_t>(base_);
        if (offset < 0 || size_t(offset) + size > bytes_)
            trap("%s: %zu bytes at byte %td are out of bounds of the block's shared memory (%zu bytes)", what, size,
                 offset, bytes_);
        if (size_t(offset) % alignment)
            trap("%s: byte %td of shared memory is misaligned, %zu bytes need a multiple of %zu", what, offset, size,
                 alignment);
        return size_t(offset);
    }

    // `whole_warp`: the value goes to all lanes of the warp.
    void read(const char* what, size_t offset, size_t size, const Moment& now, bool whole_warp = false) {
        for (size_t i = offset; i < offset + size; ++i) {
            Byte& byte = shadow_[i];
            if (byte.state == kEmpty)
                trap("%s: byte %zu of shared memory is uninitialised: nothing has written it yet", what, i);
            if (byte.state == kPending)
                trap("%s: byte %zu of shared memory is the target of a cp.async of thread %d that was not waited for",
                     what, i, byte.write.thread);
            if ((byte.write.thread != now.thread || whole_warp) && !ordered(byte.write, now))
                trap("race: %s reads byte %zu of shared memory, written by thread %d with no barrier in between", what,
                     i, byte.write.thread);
            const Reader reader = whole_warp ? Reader::warp : Reader::thread;
            if (byte.readers != Reader::none && !ordered_read(byte, now)) {
                if (byte.readers == Reader::many || byte.read.warp() != now.warp())
                    byte.readers = Reader::many;
                else if (byte.readers != reader || byte.read.thread != now.thread)
                    byte.readers = Reader::warp;
            } else {
                byte.readers = reader;
            }
            byte.read = now;
        }
    }

    void write(const char* what, size_t offset, size_t size, const Moment& now, bool pending = false) {
        for (size_t i = offset; i < offset + size; ++i) {
            Byte& byte = shadow_[i];
            if (byte.state == kPending)
                trap(
                    "race: %s writes byte %zu of shared memory, the target of a cp.async of thread %d that was not "
                    "waited for",
                    what, i, byte.write.thread);
            if (byte.state == kWritten && byte.write.thread != now.thread && !ordered(byte.write, now))
                trap("race: %s writes byte %zu of shared memory, written by thread %d with no barrier in between", what,
                     i, byte.write.thread);
            const bool own = byte.readers == Reader::thread && byte.read.thread == now.thread;
            if (byte.state == kWritten && byte.readers != Reader::none && !own && !ordered_read(byte, now))
                trap("race: %s writes byte %zu of shared memory, read by %sthread %d with no barrier in between", what,
                     i, byte.readers == Reader::many ? "other threads, last " : "", byte.read.thread);
            byte.state = pending ? kPending : kWritten;
            byte.write = now;
            byte.readers = Reader::none;
        }
    }

    // A cp.async of the running thread has landed, and the thread has waited for it.
    void land(size_t offset, const uint8_t* data, size_t size, const Moment& now) {
        std::memcpy(base_ + offset, data, size);
        for (size_t i = offset; i < offset + size; ++i) {
            shadow_[i].state = kWritten;
            shadow_[i].write = now;
        }
    }

    static void poison(uint8_t* begin, size_t bytes) {
        for (size_t i = 0; i < bytes; ++i) begin[i] = poison_byte(begin + i);
    }

  private:
    enum State : uint8_t { kEmpty, kWritten, kPending };
    enum class Reader : uint8_t { none, thread, warp, many };
    struct Byte {
        Moment write, read;
        State state = kEmpty;
        Reader readers = Reader::none;
    };

    static bool ordered(const Moment& before, const Moment& now) {
        return before.epoch != now.epoch || (before.warp() == now.warp() && before.warp_time != now.warp_time);
    }
    static bool ordered_read(const Byte& byte, const Moment& now) {
        return byte.readers == Reader::many ? byte.read.epoch != now.epoch : ordered(byte.read, now);
    }
    static uint8_t poison_byte(const uint8_t* at) {
        return uint8_t(kPoison >> (reinterpret_cast<uintptr_t>(at) % 2 * 8));
    }
    static bool is_poison(const uint8_t* at) { return at[0] == poison_byte(at) && at[1] == poison_byte(at + 1); }
    std::vector<uint8_t> storage_;
    std::vector<Byte> shadow_;
    uint8_t* base_ = nullptr;
    size_t bytes_ = 0;
};

// Blocks of one launch run in no order: bytes that one of them writes belong to it. Another block may read them only after
// both have met at an atomic operation, with a fence before it on the writer's side (CUDA C++ Programming Guide, "Memory
// fence functions"), and may never write them.
class GlobalMemory {
  public:
    void add(const void* pointer, size_t bytes, bool initialised) {
        remove(pointer);
        Allocation made{reinterpret_cast<uintptr_t>(pointer), bytes, false, {}};
        made.state.assign(bytes, Byte{0, 0, initialised});
        const auto at = std::lower_bound(ranges_.begin(), ranges_.end(), made.begin,
                                         [](const Allocation& range, uintptr_t begin) { return range.begin < begin; });
        ranges_.insert(at, std::move(made));
        last_ = 0;
    }
    void remove(const void* pointer) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
        ranges_.erase(
            std::remove_if(ranges_.begin(), ranges_.end(), [=](const Allocation& r) { return r.begin == begin; }),
            ranges_.end());
        last_ = 0;
    }

    void begin_block(uint32_t block) {
        block_ = block + 1;
        if (releases_.size() <= block_) releases_.resize(block_ + 1);
        acquired_ = 0;
    }
    // An atomic operation by the running block; `fenced`: what it wrote before is visible to all who see the operation.
    void meet(bool fenced) {
        acquired_ = ++clock_;
        if (fenced) releases_[block_] = clock_;
    }

    // `read_only`: a load through the read-only path (ld.global.nc), undefined for bytes that this launch writes.
    void read(const char* what, const void* pointer, size_t size, size_t alignment, bool read_only) {
        Allocation& range = locate(what, pointer, size, alignment);
        const size_t offset = reinterpret_cast<uintptr_t>(pointer) - range.begin;
        for (size_t i = offset; i < offset + size; ++i) {
            const Byte& byte = range.state[i];
            if (!byte.initialised)
                trap("%s: byte %zu of an allocation of %zu bytes in global memory is uninitialised", what, i,
                     range.bytes);
            if (byte.writer == 0) continue;
            if (read_only)
                trap("%s: byte %zu of an allocation of %zu bytes in global memory was written by this launch", what, i,
                     range.bytes);
            const uint32_t released = releases_[byte.writer];
            if (byte.writer != block_ && !(released > byte.time && acquired_ > released))
                trap(
                    "race: %s reads byte %zu of an allocation of %zu bytes in global memory, written by block %u with "
                    "no fence and "
                    "atomic operation in between",
                    what, i, range.bytes, byte.writer - 1);
        }
    }
    // `atomic`: an operation that blocks may do on the same bytes.
    void write(const char* what, const void* pointer, size_t size, size_t alignment, bool atomic = false) {
        Allocation& range = locate(what, pointer, size, alignment);
        const size_t offset = reinterpret_cast<uintptr_t>(pointer) - range.begin;
        range.touched = true;
        for (size_t i = offset; i < offset + size; ++i) {
            Byte& byte = range.state[i];
            if (atomic) {
                if (!byte.initialised)
                    trap("%s: byte %zu of an allocation of %zu bytes in global memory is uninitialised", what, i,
                         range.bytes);
                continue;
            }
            if (byte.writer && byte.writer != block_)
                trap("race: %s writes byte %zu of an allocation of %zu bytes in global memory, written by block %u",
                     what, i, range.bytes, byte.writer - 1);
            byte = Byte{block_, clock_, true};
        }
    }
    // A write by the host, in the order of the stream.
    bool fill(void* pointer, int value, size_t bytes) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
        for (Allocation& range : ranges_) {
            if (at < range.begin || at + bytes > range.begin + range.bytes) continue;
            std::memset(pointer, value, bytes);
            for (size_t i = at - range.begin; i < at - range.begin + bytes; ++i) range.state[i].initialised = true;
            return true;
        }
        return bytes == 0;
    }
    void end_launch() {
        for (Allocation& range : ranges_) {
            if (range.touched)
                for (Byte& byte : range.state) byte.writer = 0;
            range.touched = false;
        }
        releases_.clear();
        clock_ = 0;
    }

  private:
    struct Byte {
        uint32_t writer;  // 1 + the block of this launch that wrote it, 0: none did
        uint32_t time;    // of that write: the number of atomic operations before
        bool initialised;
    };
    struct Allocation {
        uintptr_t begin;
        size_t bytes;
        bool touched;
        std::vector<Byte> state;
    };

    Allocation& locate(const char* what, const void* pointer, size_t size, size_t alignment) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
        if (at % alignment)
            trap("%s: global address %p is misaligned, %zu bytes need a multiple of %zu", what, pointer, size,
                 alignment);
        if (last_ >= ranges_.size() || at < ranges_[last_].begin ||
            at + size > ranges_[last_].begin + ranges_[last_].bytes) {
            const auto next = std::upper_bound(ranges_.begin(), ranges_.end(), at,
                                               [](uintptr_t a, const Allocation& range) { return a < range.begin; });
            if (next == ranges_.begin())
                outside(what, pointer, size, nullptr, next == ranges_.end() ? nullptr : &*next);
            const Allocation& range = *(next - 1);
            if (at + size > range.begin + range.bytes)
                outside(what, pointer, size, &range, next == ranges_.end() ? nullptr : &*next);
            last_ = size_t(next - 1 - ranges_.begin());
        }
        return ranges_[last_];
    }
    [[noreturn]] static void outside(const char* what, const void* pointer, size_t size, const Allocation* before,
                                     const Allocation* behind) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
        const uintptr_t past = before ? at - before->begin : UINTPTR_MAX,
                        ahead = behind ? behind->begin - at : UINTPTR_MAX;
        if (past == UINTPTR_MAX && ahead == UINTPTR_MAX)
            trap("%s: %zu bytes at %p, no global memory is registered", what, size, pointer);
        if (ahead == UINTPTR_MAX || (past != UINTPTR_MAX && past - before->bytes <= ahead))
            trap("%s: %zu bytes are out of bounds of global memory: byte %zu of an allocation of %zu bytes", what, size,
                 size_t(past), before->bytes);
        trap("%s: %zu bytes are out of bounds of global memory: %zu bytes before an allocation of %zu bytes", what,
             size, size_t(ahead), behind->bytes);
    }

    std::vector<Allocation> ranges_;  // by address, disjoint
    size_t last_ = 0;
    std::vector<uint32_t> releases_;  // by 1 + block: when it last did an atomic operation behind a fence
    uint32_t block_ = 0, acquired_ = 0, clock_ = 0;
};

}  // namespace emulator
