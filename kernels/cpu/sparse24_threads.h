// Threads of a product: their number, their memory, and how they share the pairs of panels of a linear.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparse24 {

// Ask for huge pages: streaming through small ones costs a page walk every 4 KB, two-dimensional in a virtual machine.
static void want_huge_pages(uint8_t* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
    if (end > begin && end - begin >= (uintptr_t(2) << 20))
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

struct Workspace {  // grows, and stays with its thread
    uint8_t* data = nullptr;
    size_t bytes = 0;
    ~Workspace() { std::free(data); }
    uint8_t* get(size_t wanted) {
        if (wanted > bytes) {
            std::free(data);
            bytes = (wanted + 4095) / 4096 * 4096;
            data = static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
            if (data == nullptr) bytes = 0;
            want_huge_pages(data, bytes);
        }
        return data;
    }
};

static thread_local Workspace own, shared;

static inline int threads_here() {
#if defined(_OPENMP)
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

static inline void barrier() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
}

struct Range {
    int64_t begin, end;
};

static inline Range part(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

// Calls body(thread, threads) in every thread of the pool that torch uses; in this one alone when the work is not worth more.
template <class Body>
static void in_threads(int64_t work, const Body& body) {
    const int64_t worth = 1 << 16;  // weights times rows: some microseconds, which is what waking the pool costs
    const int threads = threads_here();
    if (threads == 1 || work < worth) {
        body(0, 1);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel
    body(omp_get_thread_num(), omp_get_num_threads());
#endif
}

// The pairs of panels of a linear, shared out while they are multiplied: a thread takes from its own part, whose memory it filled
// (sparse24_pack), less and less at a time, then from the parts of threads that are behind, because their core is slower or others
// use it too.
class Shares {
  public:
    // To be made by the thread that enters the parallel region.
    explicit Shares(int64_t pairs)
        : pairs_(pairs), taken_(reinterpret_cast<Taken*>(cursors.get(threads_here() * sizeof(Taken)))) {
        if (taken_ != nullptr) std::memset(static_cast<void*>(taken_), 0, threads_here() * sizeof(Taken));
    }

    bool failed() const { return taken_ == nullptr; }

    // Calls body(pair) for each pair that is this thread's to do, in round 0, 1, ...; a barrier has to lie between two rounds.
    template <class Body>
    void each(int thread, int threads, int64_t round, const Body& body) const {
        for (int i = 0; i < threads; ++i) {
            const int owner = (thread + i) % threads;
            const Range all = part(pairs_, owner, threads);
            const int64_t count = all.end - all.begin, limit = (round + 1) * count;
            std::atomic<int64_t>& taken = taken_[owner].pairs;
            for (int64_t from = taken.load(std::memory_order_relaxed); from < limit;) {
                const int64_t to = from + std::max<int64_t>(1, (limit - from) / 4);
                if (!taken.compare_exchange_weak(from, to, std::memory_order_relaxed)) continue;
                for (int64_t p = from; p < to; ++p) body(all.begin + p - round * count);
                from = taken.load(std::memory_order_relaxed);
            }
        }
    }

  private:
    struct alignas(64) Taken {
        std::atomic<int64_t> pairs;  // of an owner's part, in all rounds
    };
    static thread_local Workspace cursors;

    const int64_t pairs_;
    Taken* const taken_;
};

thread_local Workspace Shares::cursors;

}  // namespace sparse24
