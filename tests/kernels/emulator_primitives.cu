// Small kernels, each for one thing that the emulator must do or refuse (test_emulator.py calls them by name).
#include <stdint.h>
#include <string.h>

#include "../emulator/cuda_emulator.h"

namespace {

template <class V>
V get(const uint8_t* in, int index) {
    return global_load<V>(in + index * sizeof(V));
}
template <class V>
void put(uint8_t* out, int index, V value) {
    global_store<V>(out + index * sizeof(V), value);
}
__device__ uint8_t* slot(int index, int bytes = 4) { return extern_shared() + index * bytes; }

// ---- numbers: one thread per element
__global__ void widen_bf16(const uint8_t* in, uint8_t* out, int) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    put<float>(out, i, __bfloat162float(get<__nv_bfloat16>(in, i)));
}
__global__ void widen_f16(const uint8_t* in, uint8_t* out, int) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    put<float>(out, i, __half2float(get<__half>(in, i)));
}
__global__ void round_bf16(const uint8_t* in, uint8_t* out, int) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    put<__nv_bfloat16>(out, i, __float2bfloat16_rn(get<float>(in, i)));
}
__global__ void round_f16(const uint8_t* in, uint8_t* out, int) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    put<__half>(out, i, __float2half_rn(get<float>(in, i)));
}
__global__ void fma_pairs(const uint8_t* in, uint8_t* out, int type) {  // in: [count, 3] words
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t a = get<uint32_t>(in, 3 * i), b = get<uint32_t>(in, 3 * i + 1), c = get<uint32_t>(in, 3 * i + 2);
    put<uint32_t>(out, i, type ? fma2<__half>(a, b, c) : fma2<__nv_bfloat16>(a, b, c));
}
__global__ void logic(const uint8_t* in, uint8_t* out, int) {
    put<uint32_t>(out, threadIdx.x, lop3_and_or(get<uint32_t>(in, 0), get<uint32_t>(in, 1), get<uint32_t>(in, 2)));
}

// ---- the grid: every thread writes who it is
__global__ void indices(const uint8_t*, uint8_t* out, int) {
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned all[6] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z};
    for (int i = 0; i < 6; ++i) put<uint32_t>(out, (block * threads + thread) * 6 + i, all[i]);
}

// ---- instructions of a warp. A warp's operands lie in global memory, lane after lane.
template <class T>
void multiply(const uint8_t* in, uint8_t* out, int selector) {  // a lane's 13 words: d[4], a[4], b[4], e
    const int at = threadIdx.x * 13;
    float d[4];
    uint32_t a[4], b[4];
    for (int i = 0; i < 4; ++i) {
        d[i] = get<float>(in, at + i);
        a[i] = get<uint32_t>(in, at + 4 + i);
        b[i] = get<uint32_t>(in, at + 8 + i);
    }
    const uint32_t e = get<uint32_t>(in, at + 12);
    selector ? mma_sp<T, 1>(d, a, b, e) : mma_sp<T, 0>(d, a, b, e);
    for (int i = 0; i < 4; ++i) put<float>(out, threadIdx.x * 4 + i, d[i]);
}
__global__ void mma_bf16(const uint8_t* in, uint8_t* out, int selector) { multiply<__nv_bfloat16>(in, out, selector); }
__global__ void mma_f16(const uint8_t* in, uint8_t* out, int selector) { multiply<__half>(in, out, selector); }

// in: 32 offsets in shared memory (int32), then the shared memory (mode bytes)
__global__ void matrices(const uint8_t* in, uint8_t* out, int bytes) {
    for (int i = threadIdx.x; i < bytes; i += 32)
        shared_store<uint8_t>(extern_shared() + i, global_load<uint8_t>(in + 128 + i));
    block_barrier();
    uint32_t r[4];
    ldmatrix_x4(r, extern_shared() + get<int>(in, threadIdx.x));
    for (int i = 0; i < 4; ++i) put<uint32_t>(out, threadIdx.x * 4 + i, r[i]);
}

__global__ void shuffles(const uint8_t* in, uint8_t* out, int mode) {
    const float v = get<float>(in, threadIdx.x);
    put<float>(out, threadIdx.x, mode < 100 ? shuffle_xor(v, mode) : shuffle_down(v, mode - 100));
}

// ---- copies: `mode` groups of one chunk each, all but one waited for
__global__ void copies(const uint8_t* in, uint8_t* out, int mode) {
    const int i = threadIdx.x;
    for (int group = 0; group < 3; ++group) {
        cp_async_16(slot(group * 32 + i, 16), in + (group * 32 + i) * 16, (group + i) % 5 != 0);
        if (group < 2 || mode != 2) cp_async_commit();
    }
    if (mode == 0) cp_async_wait<0>();  // all three
    if (mode == 1) cp_async_wait<1>();  // the first two
    if (mode == 2) cp_async_wait<0>();  // the third was not committed
    if (mode == 3) cp_async_wait<2>();  // the first
    if (mode == 5) {
        cp_async_wait<0>();  // by each thread, but the others' copies are read below
    } else if (mode == 6) {
        block_barrier();  // before the wait instead of after it
        cp_async_wait<0>();
    } else {
        block_barrier();
    }
    const int groups = mode == 3 || mode == 4 ? 1 : mode == 1 ? 2 : 3;
    const int other = i ? i - 1 : 0;
    for (int group = 0; group < groups; ++group)
        put<uint4>(out, group * 32 + i, shared_load<uint4>(slot(group * 32 + other, 16)));
}

// A thread waits and reads its own copies with no barrier: allowed.
__global__ void own_copies(const uint8_t* in, uint8_t* out, int) {
    cp_async_16(slot(threadIdx.x, 16), in + threadIdx.x * 16, true);
    cp_async_commit();
    cp_async_wait<0>();
    put<uint4>(out, threadIdx.x, shared_load<uint4>(slot(threadIdx.x, 16)));
}

// ---- order in shared memory. mode: what stands between two accesses, 0 nothing, 1 warp_barrier, 2 block_barrier
__device__ void between(int mode) {
    if (mode == 1) warp_barrier();
    if (mode == 2) block_barrier();
}
template <int apart>  // threads between writer and reader: 1 the same warp, 32 another
void write_read(uint8_t* out, int mode) {
    const int i = threadIdx.x;
    shared_store<int>(slot(i), i);
    between(mode);
    put<int>(out, i, shared_load<int>(slot(i >= apart ? i - apart : i)));
}
__global__ void write_read_near(const uint8_t*, uint8_t* out, int mode) { write_read<1>(out, mode); }
__global__ void write_read_far(const uint8_t*, uint8_t* out, int mode) { write_read<32>(out, mode); }
__global__ void read_write(const uint8_t*, uint8_t* out, int mode) {  // of a neighbour's slot
    const int n = blockDim.x;
    shared_store<int>(slot(threadIdx.x), int(threadIdx.x));
    block_barrier();
    const int seen = shared_load<int>(slot((threadIdx.x + 1) % n));
    between(mode);
    shared_store<int>(slot(threadIdx.x), -1);
    put<int>(out, threadIdx.x, seen);
}
__global__ void read_copy(const uint8_t* in, uint8_t* out, int mode) {  // a copy into what a neighbour has just read
    const int n = blockDim.x;
    shared_store<uint4>(slot(threadIdx.x, 16), uint4{threadIdx.x, 0, 0, 0});
    block_barrier();
    const uint4 seen = shared_load<uint4>(slot((threadIdx.x + 1) % n, 16));
    between(mode);
    cp_async_16(slot(threadIdx.x, 16), in + threadIdx.x * 16, true);
    cp_async_commit();
    cp_async_wait<0>();
    put<int>(out, threadIdx.x, int(seen.x));
}
__global__ void write_write(const uint8_t*, uint8_t* out, int mode) {
    const int n = blockDim.x;
    shared_store<int>(slot(threadIdx.x), 1);
    between(mode);
    shared_store<int>(slot((threadIdx.x + 1) % n), 2);
    put<int>(out, threadIdx.x, 0);
}
__global__ void write_ldmatrix(const uint8_t*, uint8_t* out, int mode) {  // each lane stores the row that it names
    shared_store<uint4>(slot(threadIdx.x, 16), uint4{threadIdx.x, 0, 0, 0});
    between(mode);
    uint32_t r[4];
    ldmatrix_x4(r, slot(threadIdx.x, 16));
    put<uint32_t>(out, threadIdx.x, r[0]);
}
// Two bytes of one word, by two threads: no conflict.
__global__ void bytes_of_a_word(const uint8_t*, uint8_t* out, int) {
    shared_store<uint8_t>(slot(threadIdx.x, 1), uint8_t(threadIdx.x));
    put<uint8_t>(out, threadIdx.x, shared_load<uint8_t>(slot(threadIdx.x, 1)));
}

// ---- banks: lanes `mode` bytes apart write, copy and read 4, 16 and 8 bytes
__global__ void strided(const uint8_t* in, uint8_t*, int mode) {
    shared_store<int>(extern_shared() + threadIdx.x * mode, 0);
    block_barrier();
    cp_async_16(extern_shared() + threadIdx.x * mode, in, false);
    cp_async_commit();
    cp_async_wait<0>();
    shared_load<uint2>(extern_shared() + threadIdx.x * mode);
}

// ---- what must be refused
__global__ void uninitialised(const uint8_t*, uint8_t* out, int) { put<int>(out, 0, shared_load<int>(slot(0))); }
__global__ void shared_access(const uint8_t*, uint8_t*, int offset) { shared_store<int>(extern_shared() + offset, 0); }
__global__ void raw_write(const uint8_t*, uint8_t*, int offset) { *(extern_shared() + offset) = 1; }
__global__ void global_access(const uint8_t* in, uint8_t* out, int offset) {
    put<int>(out, 0, global_load<int>(in + offset));
}
__global__ void global_write(const uint8_t*, uint8_t* out, int offset) { global_store<int>(out + offset, 0); }
__global__ void global_copy(const uint8_t* in, uint8_t*, int offset) {
    cp_async_16(extern_shared(), in + offset, true);
}
__global__ void empty_copy(const uint8_t* in, uint8_t*, int offset) {
    cp_async_16(extern_shared(), in + offset, false);
}
__global__ void read_only_of_written(const uint8_t*, uint8_t* out, int wide) {
    put<uint4>(out, 0, uint4{1, 2, 3, 4});
    if (wide) {
        put<uint4>(out, 1, load_nc_u128(out));
    } else {
        put<uint32_t>(out, 4, load_nc_u32(out));
    }
}
__global__ void read_only(const uint8_t* in, uint8_t* out, int) {
    put<uint4>(out, 0, load_nc_u128(in));
    put<uint32_t>(out, 4, load_nc_u32(in + 4));
}
__global__ void half_a_warp(const uint8_t*, uint8_t* out, int mode) {
    float v = float(threadIdx.x);
    if (mode == 0 && threadIdx.x % 32 < 16) v = shuffle_xor(v, 1);  // the others leave
    if (mode == 1) v = threadIdx.x % 32 < 16 ? shuffle_xor(v, 1) : shuffle_xor(v, 2);
    if (mode == 2) v = threadIdx.x % 32 < 16 ? shuffle_xor(v, 1) : shuffle_down(v, 1);
    if (mode == 3) threadIdx.x % 32 < 16 ? block_barrier() : warp_barrier();
    put<float>(out, threadIdx.x, v);
}
__global__ void half_a_barrier(const uint8_t*, uint8_t* out, int mode) {
    if (int(threadIdx.x) < mode) block_barrier();
    put<int>(out, threadIdx.x, 0);
}
// All warps sum in a loop whose length depends on the warp: allowed.
__global__ void uneven_warps(const uint8_t*, uint8_t* out, int) {
    float v = 1;
    for (unsigned i = 0; i <= threadIdx.x / 32; ++i)
        for (int mask = 16; mask; mask /= 2) v += shuffle_xor(v, mask);
    block_barrier();
    put<float>(out, threadIdx.x, v);
}

// ---- blocks. mode: 0 the last to arrive sums, 1 without a fence, 2 without the atomic's answer, 3 all write the same bytes
__global__ void last_sums(const uint8_t* in, uint8_t* out, int mode) {
    unsigned* arrived = reinterpret_cast<unsigned*>(out);
    if (threadIdx.x == 0) put<int>(out, mode == 3 ? 2 : 2 + blockIdx.x, get<int>(in, blockIdx.x));
    if (mode != 1) thread_fence();
    block_barrier();
    if (threadIdx.x != 0) return;
    if (mode != 2 && atomic_add(arrived, 1) != gridDim.x - 1) return;
    if (mode == 2 && blockIdx.x != gridDim.x - 1) return;
    thread_fence();
    int sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += get<int>(out, 2 + i);
    put<int>(out, 1, sum);
}

struct Named {
    const char* name;
    void (*kernel)(const uint8_t*, uint8_t*, int);
};
#define NAMED(kernel) {#kernel, kernel}
const Named KERNELS[] = {
    NAMED(widen_bf16),
    NAMED(widen_f16),
    NAMED(round_bf16),
    NAMED(round_f16),
    NAMED(fma_pairs),
    NAMED(logic),
    NAMED(indices),
    NAMED(mma_bf16),
    NAMED(mma_f16),
    NAMED(matrices),
    NAMED(shuffles),
    NAMED(copies),
    NAMED(own_copies),
    NAMED(write_read_near),
    NAMED(write_read_far),
    NAMED(read_write),
    NAMED(read_copy),
    NAMED(write_write),
    NAMED(write_ldmatrix),
    NAMED(bytes_of_a_word),
    NAMED(strided),
    NAMED(uninitialised),
    NAMED(shared_access),
    NAMED(raw_write),
    NAMED(global_access),
    NAMED(global_write),
    NAMED(global_copy),
    NAMED(empty_copy),
    NAMED(read_only_of_written),
    NAMED(read_only),
    NAMED(half_a_warp),
    NAMED(half_a_barrier),
    NAMED(uneven_warps),
    NAMED(last_sums),
};

}  // namespace

extern "C" int primitive(const char* name, const void* in, void* out, int mode, const unsigned* grid,
                         const unsigned* block, int shared_bytes) {
    for (const Named& named : KERNELS) {
        if (strcmp(named.name, name) != 0) continue;
        const auto kernel = named.kernel;
        SPARSIFY_LAUNCH(kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), shared_bytes,
                        nullptr, static_cast<const uint8_t*>(in), static_cast<uint8_t*>(out), mode);
        return cudaGetLastError();
    }
    return -1;
}

extern "C" int clear_bytes(void* out, int value, int64_t bytes) { return cudaMemsetAsync(out, value, bytes, nullptr); }
extern "C" int allow_shared(const char* name, int bytes) {
    for (const Named& named : KERNELS)
        if (strcmp(named.name, name) == 0)
            return cudaFuncSetAttribute(named.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return -1;
}
