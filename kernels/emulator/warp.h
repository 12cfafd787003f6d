// The instructions of the kernels, with the meaning that the PTX ISA gives them (chapter 9.7 of version 9.0).
#pragma once

#include "machine.h"
#include "numbers.h"

namespace emulator {

// ------------------------------------------------------------------------------------------------- memory
template <class V>
inline V shared_load(const void* pointer) {
    Machine& m = machine();
    const size_t offset = m.shared.locate("shared_load", pointer, sizeof(V), alignof(V));
    m.shared.read("shared_load", offset, sizeof(V), m.now());
    m.count_access(kLoad, offset, sizeof(V));
    V value;
    std::memcpy(&value, pointer, sizeof(V));
    return value;
}

template <class V>
inline void shared_store(void* pointer, V value) {
    Machine& m = machine();
    const size_t offset = m.shared.locate("shared_store", pointer, sizeof(V), alignof(V));
    m.shared.write("shared_store", offset, sizeof(V), m.now());
    m.count_access(kStore, offset, sizeof(V));
    std::memcpy(pointer, &value, sizeof(V));
}

template <class V>
inline V load(const char* what, const void* pointer, bool read_only) {
    Machine& m = machine();
    m.global.read(what, pointer, sizeof(V), alignof(V), read_only);
    m.counters.global_bytes_read += sizeof(V);
    V value;
    std::memcpy(&value, pointer, sizeof(V));
    return value;
}

template <class V>
inline V global_load(const void* pointer) {
    return load<V>("global_load", pointer, false);
}

template <class V>
inline void global_store(void* pointer, V value) {
    Machine& m = machine();
    m.global.write("global_store", pointer, sizeof(V), alignof(V));
    m.counters.global_bytes_written += sizeof(V);
    m.thread().unfenced = true;
    std::memcpy(pointer, &value, sizeof(V));
}

inline unsigned atomic_add(unsigned* pointer, unsigned value) {
    Machine& m = machine();
    m.global.write("atomic_add", pointer, sizeof(unsigned), alignof(unsigned), true);
    m.meet_blocks();
    const unsigned old = *pointer;
    *pointer = old + value;
    return old;
}

inline void thread_fence() { machine().thread_fence(); }

// 9.7.9.25.3.1, cp.async.cg with cp-size 16 and src-size 16 or 0: the bytes are undefined until the copy was waited for.
inline void cp_async_16(void* shared, const void* global, bool valid = true) {
    Machine& m = machine();
    Thread& thread = m.thread();
    const size_t offset = m.shared.locate("cp_async_16", shared, 16, 16);
    if (reinterpret_cast<uintptr_t>(global) % 16) trap("cp_async_16: global address %p is misaligned", global);
    m.shared.write("cp_async_16", offset, 16, m.now(), true);
    m.count_access(kCopy, offset, 16);
    SharedMemory::poison(m.shared.base() + offset, 16);
    Copy copy{offset, {}};
    if (valid) {
        m.global.read("cp_async_16", global, 16, 16, false);
        m.counters.global_bytes_read += 16;
        std::memcpy(copy.data, global, 16);
    }
    ++m.counters.copies;
    thread.copies.push_back(copy);
    ++thread.uncommitted;
}

inline void cp_async_commit() {
    Thread& thread = machine().thread();
    thread.commits.push_back(thread.uncommitted);
    thread.uncommitted = 0;
}

// Waits until at most N of the latest groups are under way. What was not committed is not waited for.
template <int N>
inline void cp_async_wait() {
    machine().cp_async_wait(N);
}

inline void block_barrier() { machine().block_barrier(); }
inline void warp_barrier() { machine().warp_barrier(); }

// ------------------------------------------------------------------------------------------------- shuffles
// `source(lane, parameter)`: which lane's value a lane receives; beyond the warp it keeps its own.
template <class Source>
inline float shuffle(const char* what, float value, int parameter, Source) {
    struct Operand {
        float in;
        float* out;
    };
    float result;
    const Operand operand{value, &result};
    machine().collective(what, parameter, &operand, [](Machine&, const void* const* operands, int step) {
        const auto at = [&](int lane) -> const Operand& { return *static_cast<const Operand*>(operands[lane]); };
        for (int lane = 0; lane < kLanes; ++lane) {
            const int source = Source::of(lane, step);
            *at(lane).out = at(source < kLanes ? source : lane).in;
        }
    });
    return result;
}

struct Across {
    static int of(int lane, int mask) { return lane ^ mask; }
};
struct Above {
    static int of(int lane, int delta) { return lane + delta; }
};
inline float shuffle_xor(float value, int mask) { return shuffle("shuffle_xor", value, mask, Across()); }
inline float shuffle_down(float value, int delta) { return shuffle("shuffle_down", value, delta, Above()); }

// ------------------------------------------------------------------------------------------------- matrices
// 9.7.14.5.15: lane l names row l % 8 of matrix l / 8 (16 bytes, aligned) and receives of each matrix the two values in
// row l / 4, columns 2 (l % 4) and + 1.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    struct Operand {
        uint32_t* registers;
        const void* row;
    } operand{r, row};
    machine().collective("ldmatrix_x4", 0, &operand, [](Machine& m, const void* const* operands, int) {
        ++m.counters.ldmatrix;
        const auto at = [&](int lane) { return static_cast<const Operand*>(operands[lane]); };
        WarpAccesses rows;
        for (int matrix = 0; matrix < 4; ++matrix) {
            for (int i = 0; i < 8; ++i) {
                const int lane = 8 * matrix + i;
                m.act_as(lane);
                const size_t offset = m.shared.locate("ldmatrix_x4", at(lane)->row, 16, 16);
                m.shared.read("ldmatrix_x4", offset, 16, m.now(), true);
                rows.add(lane, offset);
                for (int reader = 4 * i; reader < 4 * i + 4; ++reader)
                    std::memcpy(&at(reader)->registers[matrix],
                                static_cast<const uint8_t*>(at(lane)->row) + reader % 4 * 4, 4);
            }
        }
        m.counters.ldmatrix_conflicts += rows.take_conflicts(16);
    });
}

// mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.T.T.f32 (9.7.14.6.2.2 and 9.7.14.6.1), g = lane / 4, t = lane % 4:
//   a[0]: row g, kept values 2 t and 2 t + 1 of 16; a[1]: row g + 8; a[2] and a[3]: the same of kept values 8 + 2 t, 9 + 2 t
//   b[i]: rows 8 i + 2 t and + 1 of column g
//   d[0], d[1]: row g, columns 2 t and 2 t + 1; d[2], d[3]: row g + 8
//   e of lanes t = 2 SELECTOR (dense columns 0 - 15) and 2 SELECTOR + 1 (16 - 31): row g in the low, row g + 8 in the high 16
//   bits; nibble q is quad q of these columns: the first kept value's place in bits 0-1, the second's, greater, in bits 2-3.
// A product of two 16-bit values is exact. Here the 16 products of an output and d are added in float64, in the order of the
// columns, and rounded to float32 once. The hardware's order and its truncations are not specified.
template <class T, int SELECTOR>
inline void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {
    static_assert(SELECTOR == 0 || SELECTOR == 1, "the sparsity selector of m16n8k32 is 0 or 1");
    struct Operand {
        float* d;
        const uint32_t *a, *b;
        uint32_t e;
    } operand{d, a, b, e};
    machine().collective(Number<T>::mma_name, SELECTOR, &operand, [](Machine& m, const void* const* operands, int) {
        ++m.counters.mma;
        const auto at = [&](int lane) -> const Operand& { return *static_cast<const Operand*>(operands[lane]); };
        double right[32][8], sums[16][8];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 8; ++i)
                right[8 * (i / 2) + 2 * t + i % 2][g] = Number<T>::widen(uint16_t(at(lane).b[i / 2] >> 16 * (i % 2)));
            for (int i = 0; i < 4; ++i) sums[g + 8 * (i / 2)][2 * t + i % 2] = at(lane).d[i];
        }
        for (int row = 0; row < 16; ++row) {
            for (int quad = 0; quad < 8; ++quad) {
                const int holder = row % 8 * 4 + 2 * SELECTOR + quad / 4;
                const uint32_t places = at(holder).e >> (16 * (row / 8) + 4 * (quad % 4)) & 0xf;
                const uint32_t place[2] = {places & 3, places >> 2};
                if (place[0] >= place[1]) {
                    m.act_as(holder);
                    trap("mma_sp: invalid metadata 0x%x for quad %d of row %d (places must ascend), in e = 0x%08x",
                         places, quad, row, at(holder).e);
                }
                for (int i = 0; i < 2; ++i) {
                    const int kept = 2 * quad + i, lane = row % 8 * 4 + kept % 8 / 2;
                    const double left =
                        Number<T>::widen(uint16_t(at(lane).a[row / 8 + 2 * (kept / 8)] >> 16 * (kept % 2)));
                    const double* values = right[4 * quad + place[i]];
                    for (int column = 0; column < 8; ++column) sums[row][column] += left * values[column];
                }
            }
        }
        for (int lane = 0; lane < kLanes; ++lane)
            for (int i = 0; i < 4; ++i) at(lane).d[i] = float(sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
    });
}

// ------------------------------------------------------------------------------------------------- arithmetic
inline uint32_t lop3_and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

// a b + c on two packed values, each rounded once (9.7.4.4).
template <class T>
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const auto part = [&](uint32_t v) { return double(Number<T>::widen(uint16_t(v >> shift))); };
        result |= uint32_t(Number<T>::round(fma_to_odd(part(a), part(b), part(c)))) << shift;
    }
    return result;
}

}  // namespace emulator
