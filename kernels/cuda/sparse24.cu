// y = x W' + bias on NVIDIA GPUs (sm_80 and newer), W: [N, K] 2:4 sparse with 4-bit codes, multiplied by the sparse tensor cores.
//
// One instruction does the work: mma.sp m16n8k32 multiplies a 16 x 32 tile of W, of which it is given the 16 x 16 kept values and
// their positions, with a 32 x 8 tile of x' (PTX ISA, "Warp-level matrix multiply-accumulate instructions with sparse matrix A").
// W is the sparse operand, so tokens are columns and a single token costs no more than eight.
//
// The idea of the file, after MARLIN (arXiv 2408.11743): at load time the weights are put into the order in which the lanes of a
// warp want them (`pack`), so that a kernel streams them through shared memory with 16-byte copies, each lane picks up whole
// registers, and three instructions turn two codes into two operands: exact small integers in the type of x. For few tokens, products
// are summed in float32 over one group of inputs and that sum is multiplied by the group's scale: nothing is rounded before the
// result is. For more, multiplying sums would cost more than the products; there the weights are multiplied by their scale and
// rounded to the type of x, once, which makes them the weights of the dense export.
//
// The C interface is at the end. Nothing here allocates, synchronises or keeps state. The same source runs on a CPU under
// kernels/emulator, which checks every access.
#include <stdint.h>

#ifdef SPARSIFY_EMULATOR
#include "../emulator/cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// ------------------------------------------------------------------------------------------------- instructions
// One function per hardware instruction; the emulator has its own set of the same names.

#define SPARSIFY_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

__device__ __forceinline__ uint8_t* extern_shared() {
    extern __shared__ __align__(128) uint8_t bytes[];
    return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, asynchronously.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lane l names row l % 8 of matrix l / 8 and receives the pair (l / 4, 2 (l % 4)) of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Since PTX 8.5 an instruction of its own says that positions ascend; the older one is slow on sm_90 and newer.
#if defined(__CUDACC_VER_MAJOR__) && \
    (__CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5))
#define SPARSIFY_MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32"
#else
#define SPARSIFY_MMA_SP "mma.sp.sync.aligned.m16n8k32.row.col.f32"
#endif
#define SPARSIFY_MMA_SP_OF(type)                                                                                      \
    asm(SPARSIFY_MMA_SP type " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e),             \
          "n"(SELECTOR))

// d += a b with a sparse: [16, 32] from 16 kept values a row, b: [32, 8], d: [16, 8]. SELECTOR: which two lanes of every four hold e.
template <class T, int SELECTOR>
__device__ __forceinline__ void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e);
template <>
__device__ __forceinline__ void mma_sp<__half, 0>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                  uint32_t e) {
    constexpr int SELECTOR = 0;
    SPARSIFY_MMA_SP_OF(".f16.f16.f32");
}
template <>
__device__ __forceinline__ void mma_sp<__half, 1>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                  uint32_t e) {
    constexpr int SELECTOR = 1;
    SPARSIFY_MMA_SP_OF(".f16.f16.f32");
}
template <>
__device__ __forceinline__ void mma_sp<__nv_bfloat16, 0>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                         uint32_t e) {
    constexpr int SELECTOR = 0;
    SPARSIFY_MMA_SP_OF(".bf16.bf16.f32");
}
template <>
__device__ __forceinline__ void mma_sp<__nv_bfloat16, 1>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                         uint32_t e) {
    constexpr int SELECTOR = 1;
    SPARSIFY_MMA_SP_OF(".bf16.bf16.f32");
}

// (a & b) | c in one instruction
__device__ __forceinline__ uint32_t lop3_and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"((0xF0 & 0xCC) | 0xAA));
    return d;
}

// a b + c on two packed values of T, rounded once
template <class T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma2<__half>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
template <>
__device__ __forceinline__ uint32_t fma2<__nv_bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }

template <class V>
__device__ __forceinline__ V shared_load(const void* pointer) {
    return *static_cast<const V*>(pointer);
}
template <class V>
__device__ __forceinline__ void shared_store(void* pointer, V value) {
    *static_cast<V*>(pointer) = value;
}
template <class V>
__device__ __forceinline__ V global_load(const void* pointer) {
    return *static_cast<const V*>(pointer);
}
template <class V>
__device__ __forceinline__ void global_store(void* pointer, V value) {
    *static_cast<V*>(pointer) = value;
}
#endif

namespace {

// ------------------------------------------------------------------------------------------------- the packed weight
// A unit is 32 outputs by 64 inputs: two 16-row tiles (m) by two steps of 32 inputs (s). For a lane (g = lane / 4, t = lane % 4):
//   16 bytes of codes: word 2 m + s holds rows 16 m + g and + 8, kept values 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of the step's 16; nibble j
//                      is the first and nibble j + 4 the second half of matrix register j
//    8 bytes of positions: word m holds, for both rows, the four quads of inputs 16 t to 16 t + 15: lanes t = 0, 1 serve step 0
//                      (selector 0) and t = 2, 3 step 1 (selector 1)
// The units of 32 outputs follow each other along the inputs; all scales come after all units: for each 32 outputs and each group
// 32 values, those of rows g, g + 8, g + 16, g + 24 side by side.
constexpr int UNIT_ROWS = 32, UNIT_INPUTS = 64;
constexpr int CODE_BYTES = 512, META_BYTES = 256, UNIT_BYTES = CODE_BYTES + META_BYTES;
constexpr int SCALE_BYTES = UNIT_ROWS * 2;  // of one group
constexpr int CHUNK = 16;                   // bytes a copy moves
constexpr int LANES = 32;

enum { BFLOAT16 = 0, FLOAT16 = 1 };

struct Shape {  // of the linear
    int n, k, group;
    __host__ __device__ int tiles() const { return k / UNIT_INPUTS; }
    __host__ __device__ int units() const { return n / UNIT_ROWS; }
    __host__ __device__ int groups() const { return k / group; }
    __host__ __device__ int tile_shift() const {
        return group == k ? 31 : group / UNIT_INPUTS - 1;
    }  // tile >> this: its group, 64 and up
    __host__ __device__ size_t scales_at() const { return size_t(units()) * tiles() * UNIT_BYTES; }
};

bool served(int64_t n, int64_t k, int64_t group) {
    const bool whole = group == k || group == 32 || group == 64 || group == 128;
    return n > 0 && k > 0 && n <= (1 << 24) && k <= (1 << 24) && n % 64 == 0 && k % UNIT_INPUTS == 0 && whole &&
           k % group == 0;
}

__device__ __forceinline__ uint32_t code(const uint32_t* words, size_t row_words, int row, int kept) {
    return global_load<uint32_t>(words + row * row_words + kept / 8) >> (4 * (kept % 8)) & 0xF;
}

// One thread per lane of a unit, then one per 16 bits of scales.
__global__ void pack_kernel(Shape shape, const uint32_t* words, const uint8_t* meta, const uint16_t* scales,
                            uint8_t* packed) {
    const size_t unit_lanes = size_t(shape.units()) * shape.tiles() * LANES;
    const size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index < unit_lanes) {
        const int lane = index % LANES, tile = index / LANES % shape.tiles(), unit = index / LANES / shape.tiles();
        const int g = lane / 4, t = lane % 4;
        uint8_t* out = packed + (size_t(unit) * shape.tiles() + tile) * UNIT_BYTES;
        for (int m = 0; m < 2; ++m) {
            const int row = unit * UNIT_ROWS + 16 * m + g;
            for (int s = 0; s < 2; ++s) {
                uint32_t word = 0;
                for (int j = 0; j < 4;
                     ++j) {  // matrix register j: row g or g + 8, the first or the second eight kept values
                    const int kept = tile * UNIT_INPUTS / 2 + 16 * s + 8 * (j / 2) + 2 * t;
                    word |= code(words, shape.k / 16, row + 8 * (j % 2), kept) << (4 * j);
                    word |= code(words, shape.k / 16, row + 8 * (j % 2), kept + 1) << (4 * j + 16);
                }
                global_store<uint32_t>(out + lane * 16 + (2 * m + s) * 4, word);
            }
            uint32_t positions = 0;
            for (int half = 0; half < 2; ++half) {
                const uint8_t* two = meta + size_t(row + 8 * half) * (shape.k / 8) + tile * 8 + 2 * t;
                positions |= uint32_t(global_load<uint8_t>(two) | global_load<uint8_t>(two + 1) << 8) << (16 * half);
            }
            global_store<uint32_t>(out + CODE_BYTES + lane * 8 + m * 4, positions);
        }
        return;
    }
    const size_t i = index - unit_lanes;
    if (i >= size_t(shape.n) * shape.groups()) return;
    const int place = i % UNIT_ROWS, group = i / UNIT_ROWS % shape.groups(), unit = i / UNIT_ROWS / shape.groups();
    const int row = unit * UNIT_ROWS + place % 4 * 8 + place / 4;
    global_store<uint16_t>(packed + shape.scales_at() + i * 2,
                           global_load<uint16_t>(scales + size_t(row) * shape.groups() + group));
}

// ------------------------------------------------------------------------------------------------- decoding
template <class T>
struct Type;
template <>
struct Type<__nv_bfloat16> {
    static constexpr uint32_t MAGIC = 0x43004300, ONE = 0x3F803F80, OFFSET = 0xC308C308;  // 128 + code, 1, -(128 + 8)
    static constexpr uint32_t MINUS_ZERO = 0x80008000;                                    // what fma adds to multiply
    static __device__ __forceinline__ uint16_t round(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
    static __device__ __forceinline__ float widen(uint16_t v) { return __bfloat162float(__ushort_as_bfloat16(v)); }
};
template <>
struct Type<__half> {
    static constexpr uint32_t MAGIC = 0x64006400, ONE = 0x3C003C00, OFFSET = 0xE408E408;  // 1024 + code, 1, -(1024 + 8)
    static constexpr uint32_t MINUS_ZERO = 0x80008000;
    static __device__ __forceinline__ uint16_t round(float v) { return __half_as_ushort(__float2half_rn(v)); }
    static __device__ __forceinline__ float widen(uint16_t v) { return __half2float(__ushort_as_half(v)); }
};

// Eight offset codes to the eight integers -8 to 7: a code put into the low bits of 2^7 (2^10) is that number plus the code.
template <class T>
__device__ __forceinline__ void decode(uint32_t codes, uint32_t (&a)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        a[j] = fma2<T>(lop3_and_or(codes >> (4 * j), 0x000F000F, Type<T>::MAGIC), Type<T>::ONE, Type<T>::OFFSET);
    }
}

__device__ __forceinline__ float scale_of(uint32_t pair, int which, int scale_type) {
    const uint16_t bits = uint16_t(which ? pair >> 16 : pair);
    return scale_type == BFLOAT16 ? Type<__nv_bfloat16>::widen(bits) : Type<__half>::widen(bits);
}

// ------------------------------------------------------------------------------------------------- the product
// A block makes ROWS outputs for TOKENS tokens out of the inputs that its split owns. Its warps are arranged along outputs (WR), tokens
// (WT) and inputs (WK): in every stage of the pipeline each of the WK takes one tile of 64 inputs.
template <int UNITS_, int SLICES_, int WR_, int WT_, int WK_, int STAGES_>
struct Config {
    static constexpr int UNITS = UNITS_;    // of 32 outputs, per warp
    static constexpr int SLICES = SLICES_;  // of 8 tokens, per warp
    static constexpr int WR = WR_, WT = WT_, WK = WK_, STAGES = STAGES_;
    static constexpr int THREADS = WR * WT * WK * LANES;
    static constexpr int BLOCK_UNITS = UNITS * WR, ROWS = BLOCK_UNITS * UNIT_ROWS, TOKENS = SLICES * 8 * WT;
    static constexpr int INPUTS = UNIT_INPUTS * WK;      // per stage
    static constexpr bool SCALES_WEIGHTS = SLICES >= 4;  // rather than sums
};

template <class C, bool GROUP32>
struct Stage {  // byte offsets in one stage of shared memory
    static constexpr int SCALES = GROUP32 ? 2 * SCALE_BYTES : SCALE_BYTES;  // of one unit
    static constexpr int WEIGHTS_AT = 0, SCALES_AT = C::BLOCK_UNITS * C::WK * UNIT_BYTES;
    static constexpr int X_AT = SCALES_AT + C::BLOCK_UNITS * C::WK * SCALES;
    static constexpr int X_TILE = C::TOKENS * UNIT_INPUTS * 2;  // of 64 inputs: [TOKENS][64], chunks of a row swizzled
    static constexpr int BYTES = X_AT + C::WK * X_TILE;
};

template <class C, bool GROUP32>
constexpr int shared_bytes() {
    const int pipeline = C::STAGES * Stage<C, GROUP32>::BYTES;
    const int sums = (C::WK - 1) * C::ROWS * C::TOKENS * 4;  // of the warps along the inputs, at the end
    const int result = C::TOKENS * (C::ROWS + 8) * 2;
    return pipeline > sums ? (pipeline > result ? pipeline : result) : (sums > result ? sums : result);
}

// Where chunk `chunk` (16 bytes) of token `row` lies: rotated so that eight tokens' chunks fall into different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * UNIT_INPUTS * 2 + ((chunk ^ (row & 7)) * CHUNK);
}

// What a thread copies in every stage, in pieces of 16 bytes. Worked out once: the loop only adds where the stage begins.
template <class C, bool GROUP32>
struct Copies {
    using S = Stage<C, GROUP32>;
    static constexpr int UNIT_CHUNKS = UNIT_BYTES / CHUNK, SCALE_CHUNKS = S::SCALES / CHUNK,
                         ROW_CHUNKS = UNIT_INPUTS * 2 / CHUNK;
    static constexpr int ALL_WEIGHTS = C::BLOCK_UNITS * C::WK * UNIT_CHUNKS,
                         ALL_SCALES = C::BLOCK_UNITS * C::WK * SCALE_CHUNKS;
    static constexpr int ALL_X = C::TOKENS * C::WK * ROW_CHUNKS;
    static constexpr int WEIGHTS = (ALL_WEIGHTS + C::THREADS - 1) / C::THREADS,
                         SCALES = (ALL_SCALES + C::THREADS - 1) / C::THREADS;
    static constexpr int X = (ALL_X + C::THREADS - 1) / C::THREADS;

    // Of the block's first unit and token; offsets from them, in bytes, fit into 32 bits. -1: nothing to copy.
    const uint8_t *weights, *scales, *x;
    int weights_from[WEIGHTS], scales_from[SCALES], x_to[X];
    int x_from, x_step, x_copies;  // of x: the first, from one to the next, and how many
    static constexpr int X_STEP = C::THREADS / (ROW_CHUNKS * C::WK);  // the same in rows
    static_assert(C::THREADS % (ROW_CHUNKS * C::WK) == 0, "a thread copies the same chunk of several rows");
    int tiles, shift;

    __device__ __forceinline__ Copies(const Shape& shape, const uint8_t* packed, const uint16_t* activations, int ldx,
                                      int unit0, int token0, int tokens)
        : weights(packed + size_t(unit0) * shape.tiles() * UNIT_BYTES),
          scales(packed + shape.scales_at() + size_t(unit0) * shape.groups() * SCALE_BYTES),
          x(reinterpret_cast<const uint8_t*>(activations + size_t(token0) * ldx)),
          tiles(shape.tiles()),
          shift(shape.tile_shift()) {
        const int units = shape.units() - unit0, tid = threadIdx.x;
#pragma unroll
        for (int j = 0; j < WEIGHTS; ++j) {  // the WK tiles of a unit follow each other in memory
            const int i = j * C::THREADS + tid, unit = i / (C::WK * UNIT_CHUNKS), rest = i % (C::WK * UNIT_CHUNKS);
            weights_from[j] = i < ALL_WEIGHTS && unit < units ? unit * tiles * UNIT_BYTES + rest * CHUNK : -1;
        }
#pragma unroll
        for (int j = 0; j < SCALES; ++j) {
            const int i = j * C::THREADS + tid, unit = i / (C::WK * SCALE_CHUNKS), chunk = i % SCALE_CHUNKS;
            scales_from[j] = i < ALL_SCALES && unit < units ? unit * shape.groups() * SCALE_BYTES + chunk * CHUNK : -1;
        }
        // only the tokens there are: the others' rows are zeroed before the first stage
        const int chunk = tid % ROW_CHUNKS, tile = tid / ROW_CHUNKS % C::WK, row = tid / (ROW_CHUNKS * C::WK);
        x_from = (row * ldx + tile * UNIT_INPUTS) * 2 + chunk * CHUNK;
        x_step = X_STEP * ldx * 2;
        x_copies = (tokens - row + X_STEP - 1) / X_STEP;
#pragma unroll
        for (int j = 0; j < X;
             ++j) {  // rows that lie a multiple of eight apart are rotated alike; saying so saves registers
            x_to[j] = X_STEP % 8 == 0 && j > 0 ? x_to[0] + j * X_STEP * UNIT_INPUTS * 2
                                               : tile * S::X_TILE + swizzled(row + j * X_STEP, chunk);
        }
    }

    // Starts to copy the tiles from tile0 on. WHOLE: all WK of them are there.
    template <bool WHOLE>
    __device__ __forceinline__ void start(uint8_t* stage, int tile0) const {
        const int tid = threadIdx.x;
        const uint8_t *weights_at = weights + tile0 * UNIT_BYTES, *x_at = x + tile0 * UNIT_INPUTS * 2;
#pragma unroll
        for (int j = 0; j < WEIGHTS; ++j) {
            const int i = j * C::THREADS + tid;
            const bool there = WHOLE || tile0 + i % (C::WK * UNIT_CHUNKS) / UNIT_CHUNKS < tiles;
            if (weights_from[j] >= 0 && there)
                cp_async_16(stage + S::WEIGHTS_AT + i * CHUNK, weights_at + weights_from[j]);
        }
#pragma unroll
        for (int j = 0; j < SCALES; ++j) {
            const int i = j * C::THREADS + tid, tile = tile0 + i / SCALE_CHUNKS % C::WK;
            const uint8_t* from = scales + (GROUP32 ? 2 * tile : tile >> shift) * SCALE_BYTES;
            if (scales_from[j] >= 0 && (WHOLE || tile < tiles))
                cp_async_16(stage + S::SCALES_AT + i * CHUNK, from + scales_from[j]);
        }
#pragma unroll
        for (int j = 0; j < X; ++j) {
            const bool there = WHOLE || tile0 + tid / ROW_CHUNKS % C::WK < tiles;
            if (j < x_copies && there) cp_async_16(stage + S::X_AT + x_to[j], x_at + x_from + j * x_step);
        }
    }
};

// acc[unit][m][slice] += the product of one tile of 64 inputs. In shared memory: the warp's weights, and what its lane reads of
// scales and of x for the first step of 32 inputs; for the second it reads x second_step bytes further on.
template <class T, class C, bool GROUP32>
__device__ __forceinline__ void multiply_tile(float (&acc)[C::UNITS][2][C::SLICES][4], const uint8_t* weights,
                                              const uint8_t* scales, const uint8_t* x, int second_step,
                                              int scale_type) {
    using S = Stage<C, GROUP32>;
    const int lane = threadIdx.x % LANES;
    uint32_t a[C::UNITS][2][2][4], e[C::UNITS][2];
    float scale[C::UNITS][2][2][2];  // step, m, row g or g + 8
#pragma unroll
    for (int u = 0; u < C::UNITS; ++u) {
        const uint8_t* unit = weights + u * C::WK * UNIT_BYTES;
        const uint4 codes = shared_load<uint4>(unit + lane * 16);
        const uint2 meta = shared_load<uint2>(unit + CODE_BYTES + lane * 8);
        decode<T>(codes.x, a[u][0][0]);
        decode<T>(codes.y, a[u][0][1]);
        decode<T>(codes.z, a[u][1][0]);
        decode<T>(codes.w, a[u][1][1]);
        e[u][0] = meta.x;
        e[u][1] = meta.y;
        uint2 four[2];
        four[0] = shared_load<uint2>(scales + u * C::WK * S::SCALES);
        four[1] = GROUP32 ? shared_load<uint2>(scales + u * C::WK * S::SCALES + SCALE_BYTES) : four[0];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int s = i / 4, m = i / 2 % 2, half = i % 2;
            const uint32_t pair = m ? four[s].y : four[s].x;
            if (C::SCALES_WEIGHTS) {
                const uint32_t twice = half ? pair >> 16 | (pair & 0xFFFF0000) : pair << 16 | (pair & 0xFFFF);
                a[u][m][s][half] = fma2<T>(a[u][m][s][half], twice, Type<T>::MINUS_ZERO);
                a[u][m][s][half + 2] = fma2<T>(a[u][m][s][half + 2], twice, Type<T>::MINUS_ZERO);
            } else {
                scale[u][s][m][half] = scale_of(pair, half, scale_type);
            }
        }
    }
    // Several independent products are under way at a time: one alone would wait for its own result.
    constexpr int ABREAST = C::UNITS == 1 && C::SLICES % 2 == 0 ? 2 : 1, PRODUCTS = ABREAST * C::UNITS * 2;
#pragma unroll
    for (int c = 0; c < C::SLICES; c += ABREAST) {
        uint32_t b[ABREAST][2][4];
#pragma unroll
        for (int i = 0; i < ABREAST * 2; ++i) {
            ldmatrix_x4(b[i / 2][i % 2], x + (c + i / 2) * 8 * UNIT_INPUTS * 2 + (i % 2 ? second_step : 0));
        }
        float sums[ABREAST][C::UNITS][2][4] = {};
#pragma unroll
        for (int i = 0; i < 2 * PRODUCTS; ++i) {
            const int s = i / PRODUCTS, t = i / (C::UNITS * 2) % ABREAST, u = i / 2 % C::UNITS, m = i % 2;
            float (&sum)[4] = C::SCALES_WEIGHTS ? acc[u][m][c + t] : sums[t][u][m];
            if (s == 0) mma_sp<T, 0>(sum, a[u][m][0], b[t][0], e[u][m]);
            if (s == 1) mma_sp<T, 1>(sum, a[u][m][1], b[t][1], e[u][m]);
            if (C::SCALES_WEIGHTS || (s == 0 && !GROUP32)) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                acc[u][m][c + t][j] += sum[j] * scale[u][s][m][j / 2];
                sum[j] = 0;
            }
        }
    }
}

struct Arguments {
    const uint16_t* x;  // [m, k], row stride ldx
    const uint8_t* packed;
    const uint16_t* bias;  // [n] or null
    uint16_t* y;           // [m, n]
    float* partial;        // [splits, m, n], or null with one split
    Shape shape;
    int ldx, m, scale_type, splits;
};

template <class T, class C, bool GROUP32>
__global__ void __launch_bounds__(C::THREADS) linear_kernel(Arguments args) {
    using S = Stage<C, GROUP32>;
    uint8_t* shared = extern_shared();
    const Shape shape = args.shape;
    const int tid = threadIdx.x, warp = tid / LANES, lane = tid % LANES;
    const int wk = warp % C::WK, wt = warp / C::WK % C::WT, wr = warp / C::WK / C::WT;
    const int unit0 = blockIdx.x * C::BLOCK_UNITS, token0 = blockIdx.y * C::TOKENS;
    const int tokens = args.m - token0 < C::TOKENS ? args.m - token0 : C::TOKENS;
    const Copies<C, GROUP32> copies(shape, args.packed, args.x, args.ldx, unit0, token0, tokens);
    // this split's tiles of inputs, in whole stages
    const int stages = (shape.tiles() + C::WK - 1) / C::WK;
    const int first = int(int64_t(stages) * blockIdx.z / args.splits),
              last = int(int64_t(stages) * (blockIdx.z + 1) / args.splits);
    const int whole = last < shape.tiles() / C::WK ? last : shape.tiles() / C::WK;

    for (int i = tid; i < C::STAGES * C::WK * (C::TOKENS - tokens) * UNIT_INPUTS * 2 / CHUNK; i += C::THREADS) {
        const int per_tile = (C::TOKENS - tokens) * UNIT_INPUTS * 2 / CHUNK;
        uint8_t* tile = shared + i / (per_tile * C::WK) * S::BYTES + S::X_AT + i / per_tile % C::WK * S::X_TILE;
        shared_store<uint4>(tile + tokens * UNIT_INPUTS * 2 + i % per_tile * CHUNK, uint4{0, 0, 0, 0});
    }

    const auto load = [&](int stage, int slot) {
        uint8_t* at = shared + slot * S::BYTES;
        if (stage < whole) {
            copies.template start<true>(at, stage * C::WK);
        } else if (stage < last) {
            copies.template start<false>(at, stage * C::WK);
        }
        cp_async_commit();  // also when there is nothing left to load: the waits below count groups
    };
    for (int stage = first; stage < first + C::STAGES - 1; ++stage) load(stage, stage - first);

    // where this warp's part of a stage and this lane's part of that begin
    const int place = wr * C::UNITS * C::WK + wk;
    const uint8_t* weights = shared + S::WEIGHTS_AT + place * UNIT_BYTES;
    const uint8_t* scales = shared + S::SCALES_AT + place * S::SCALES + lane / 4 * 8;
    const uint8_t* x =
        shared + S::X_AT + wk * S::X_TILE + wt * C::SLICES * 8 * UNIT_INPUTS * 2 + swizzled(lane % 8, lane / 8);
    const int second_step = swizzled(lane % 8, 4 + lane / 8) - swizzled(lane % 8, lane / 8);
    const bool works = unit0 + wr * C::UNITS < shape.units();  // n is a multiple of UNITS units

    float acc[C::UNITS][2][C::SLICES][4] = {};
    int slot = 0, next_slot = C::STAGES - 1;
    for (int stage = first; stage < last; ++stage) {
        cp_async_wait<C::STAGES - 2>();
        block_barrier();  // the stage is there for all, and all are done with the one that is overwritten next
        load(stage + C::STAGES - 1, next_slot);
        if (works && stage * C::WK + wk < shape.tiles()) {
            const int at = slot * S::BYTES;
            multiply_tile<T, C, GROUP32>(acc, weights + at, scales + at, x + at, second_step, args.scale_type);
        }
        next_slot = slot;
        slot = slot + 1 == C::STAGES ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    block_barrier();  // the pipeline's memory is free

    constexpr int SUMS = C::UNITS * 2 * C::SLICES * 4;
    if (C::WK > 1) {  // the warps along the inputs hand their sums to the first of them
        float* slab = reinterpret_cast<float*>(shared) + (wr * C::WT + wt) * (C::WK - 1) * SUMS * LANES + lane;
        float* own = &acc[0][0][0][0];
        if (wk > 0) {
#pragma unroll
            for (int i = 0; i < SUMS; ++i) shared_store<float>(slab + ((wk - 1) * SUMS + i) * LANES, own[i]);
        }
        block_barrier();
        if (wk == 0) {
            for (int w = 0; w < C::WK - 1; ++w) {
#pragma unroll
                for (int i = 0; i < SUMS; ++i) own[i] += shared_load<float>(slab + (w * SUMS + i) * LANES);
            }
        }
        block_barrier();
    }

    // A lane holds outputs g and g + 8 of every 16 for tokens 2 t and 2 t + 1 of every 8.
    const int row0 = wr * C::UNITS * UNIT_ROWS + lane / 4, column0 = wt * C::SLICES * 8 + lane % 4 * 2;
    constexpr int PITCH = C::ROWS + 8;  // of the result in shared memory: [TOKENS][ROWS]
    if (wk == 0) {
#pragma unroll
        for (int u = 0; u < C::UNITS; ++u) {
#pragma unroll
            for (int mj = 0; mj < 4; ++mj) {  // 16 m + 8 j
                const int row = row0 + u * UNIT_ROWS + mj * 8, output = unit0 * UNIT_ROWS + row;
                if (output >= shape.n) continue;
                const float bias =
                    args.bias && args.splits == 1 ? Type<T>::widen(global_load<uint16_t>(args.bias + output)) : 0.0f;
#pragma unroll
                for (int c = 0; c < C::SLICES; ++c) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int token = column0 + c * 8 + i;
                        if (token >= tokens) continue;
                        const float value = acc[u][mj / 2][c][mj % 2 * 2 + i];
                        if (args.splits == 1) {
                            shared_store<uint16_t>(shared + (token * PITCH + row) * 2, Type<T>::round(value + bias));
                        } else {
                            float* out =
                                args.partial + (size_t(blockIdx.z) * args.m + token0 + token) * shape.n + output;
                            global_store<float>(out, value);
                        }
                    }
                }
            }
        }
    }
    if (args.splits > 1) return;
    block_barrier();
    const int outputs = shape.n - unit0 * UNIT_ROWS < C::ROWS ? shape.n - unit0 * UNIT_ROWS : C::ROWS;
    for (int i = tid; i < tokens * (C::ROWS / 8); i += C::THREADS) {
        const int token = i / (C::ROWS / 8), row = i % (C::ROWS / 8) * 8;
        if (row >= outputs) continue;
        const uint4 eight = shared_load<uint4>(shared + (token * PITCH + row) * 2);
        global_store<uint4>(args.y + size_t(token0 + token) * shape.n + unit0 * UNIT_ROWS + row, eight);
    }
}

// y = the sum of the splits, in their order, + bias. One thread per four outputs.
template <class T>
__global__ void __launch_bounds__(256) sum_kernel(Arguments args) {
    const size_t total = size_t(args.m) * args.shape.n, i = (size_t(blockIdx.x) * 256 + threadIdx.x) * 4;
    if (i >= total) return;
    float4 sum = global_load<float4>(args.partial + i);
    for (int split = 1; split < args.splits; ++split) {
        const float4 more = global_load<float4>(args.partial + split * total + i);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    if (args.bias) {
        const uint2 four = global_load<uint2>(args.bias + i % args.shape.n);
        sum.x += Type<T>::widen(uint16_t(four.x)), sum.y += Type<T>::widen(uint16_t(four.x >> 16));
        sum.z += Type<T>::widen(uint16_t(four.y)), sum.w += Type<T>::widen(uint16_t(four.y >> 16));
    }
    const uint2 four{Type<T>::round(sum.x) | uint32_t(Type<T>::round(sum.y)) << 16,
                     Type<T>::round(sum.z) | uint32_t(Type<T>::round(sum.w)) << 16};
    global_store<uint2>(args.y + i, four);
}

// ------------------------------------------------------------------------------------------------- choice and launch
// units, slices per warp; warps along outputs, tokens, inputs; stages; blocks that a multiprocessor of sm_90 holds
#define SPARSIFY_CONFIGS(X)   \
    X(0, 1, 1, 1, 1, 8, 4, 3) \
    X(1, 1, 1, 2, 1, 4, 4, 3) \
    X(2, 1, 1, 4, 1, 2, 6, 3) \
    X(3, 1, 2, 1, 1, 8, 3, 2) \
    X(4, 1, 2, 4, 1, 2, 4, 2) \
    X(5, 1, 4, 4, 1, 2, 4, 2) \
    X(6, 2, 8, 4, 1, 1, 4, 2)

struct Tile {
    int rows, tokens, inputs, resident;
    bool scales_weights;
    const char* name;
};
#define SPARSIFY_TILE(i, u, s, wr, wt, wk, st, resident) \
    {Config<u, s, wr, wt, wk, st>::ROWS,                 \
     Config<u, s, wr, wt, wk, st>::TOKENS,               \
     Config<u, s, wr, wt, wk, st>::INPUTS,               \
     resident,                                           \
     Config<u, s, wr, wt, wk, st>::SCALES_WEIGHTS,       \
     #u "x32 outputs, " #s "x8 tokens a warp; warps " #wr "x" #wt "x" #wk "; " #st " stages"},
constexpr Tile TILES[] = {SPARSIFY_CONFIGS(SPARSIFY_TILE)};
constexpr int CONFIGS = sizeof(TILES) / sizeof(TILES[0]);

struct Plan {
    int config, splits;
};

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// The tile shape, and into how many parts the inputs are split so that every multiprocessor has work. Measured on an H100 over the
// linears of models of 1 to 70 billion parameters; the best of all shapes and splits is seldom more than a tenth faster.
Plan plan_for(int64_t m, const Shape& shape, int sm_count, int config, bool same_types) {
    const auto blocks_of = [&](int c) {
        return int64_t(ceil_div(shape.n, TILES[c].rows)) * ceil_div(m, TILES[c].tokens);
    };
    if (config < 0) {
        const bool small =
            blocks_of(0) <= 2 * sm_count && shape.k <= 8192;  // whole rows to a block: no second kernel that sums
        config = m <= 8    ? (small                              ? 0
                              : blocks_of(2) * 4 >= sm_count * 5 ? 2
                                                                 : 1)
                 : m <= 16 ? (shape.n <= 2048 ? 3 : 4)
                 : m <= 32 ? 5
                           : 6;
        if (small && m <= 8) return {config, 1};
    }
    if (TILES[config].scales_weights && !same_types) config = 4;
    const int64_t blocks = blocks_of(config), room = int64_t(sm_count) * TILES[config].resident;
    const int64_t stages = ceil_div(shape.k, TILES[config].inputs);
    int64_t splits = room / blocks;
    splits = splits > stages / 4 ? stages / 4 : splits;  // a split has to fill its pipeline
    splits = splits > 8 ? 8 : splits;
    return {config, splits < 1 || config == 0 || config == 3 ? 1 : int(splits)};
}

template <class T, class C, bool GROUP32>
int launch(const Arguments& args, void* stream) {
    constexpr int bytes = shared_bytes<C, GROUP32>();
    const auto kernel = linear_kernel<T, C, GROUP32>;
    if (bytes > 48 * 1024 &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
        return 2;
    const dim3 grid(ceil_div(args.shape.n, C::ROWS), ceil_div(args.m, C::TOKENS), args.splits);
    SPARSIFY_LAUNCH(kernel, grid, dim3(C::THREADS), bytes, stream, args);
    if (args.splits > 1) {
        const auto sum = sum_kernel<T>;
        SPARSIFY_LAUNCH(sum, dim3(ceil_div(int64_t(args.m) * args.shape.n, 1024)), dim3(256), 0, stream, args);
    }
    return cudaGetLastError() == cudaSuccess ? 0 : 2;
}

template <class T>
int launch_config(int config, const Arguments& args, void* stream) {
    const bool group32 = args.shape.group == 32;
    switch (config) {
#define SPARSIFY_CASE(i, u, s, wr, wt, wk, st, resident)                             \
    case i:                                                                          \
        return group32 ? launch<T, Config<u, s, wr, wt, wk, st>, true>(args, stream) \
                       : launch<T, Config<u, s, wr, wt, wk, st>, false>(args, stream);
        SPARSIFY_CONFIGS(SPARSIFY_CASE)
    }
    return 1;
}

}  // namespace

// ------------------------------------------------------------------------------------------------- C interface
// Pointers are to device memory; types: 0 bfloat16, 1 float16. Status: 0 fine, 1 not served, 2 the launch failed.

// Bytes of a packed weight [n, k], or -1 when this kernel does not serve it.
extern "C" int64_t sparse24_cuda_packed_bytes(int64_t n, int64_t k, int64_t group_size) {
    if (!served(n, k, group_size)) return -1;
    return n / UNIT_ROWS * (k / UNIT_INPUTS) * UNIT_BYTES + n * (k / group_size) * 2;
}

// The tensors of a checkpoint (weight_packed, weight_meta, weight_scale of sparsify/formats/sparse24.py) into `packed`.
extern "C" int sparse24_cuda_pack(int64_t n, int64_t k, int64_t group_size,
                                  int /* scale_type: either is copied as it is */, const void* weight_packed,
                                  const void* weight_meta, const void* weight_scale, void* packed, void* stream) {
    if (!served(n, k, group_size)) return 1;
    const Shape shape{int(n), int(k), int(group_size)};
    const int64_t threads = int64_t(shape.units()) * shape.tiles() * LANES + n * shape.groups();
    SPARSIFY_LAUNCH(pack_kernel, dim3(ceil_div(threads, 256)), dim3(256), 0, stream, shape,
                    static_cast<const uint32_t*>(weight_packed), static_cast<const uint8_t*>(weight_meta),
                    static_cast<const uint16_t*>(weight_scale), static_cast<uint8_t*>(packed));
    return cudaGetLastError() == cudaSuccess ? 0 : 2;
}

extern "C" int sparse24_cuda_config_count() { return CONFIGS; }

extern "C" const char* sparse24_cuda_config_name(int config) {
    return config >= 0 && config < CONFIGS ? TILES[config].name : "";
}

// 1 when this product multiplies with weights rounded to the type of x, 0 when it rounds nothing but the result.
extern "C" int sparse24_cuda_rounds_weights(int64_t m, int64_t n, int64_t k, int64_t group_size, int type,
                                            int scale_type, int config) {
    if (!served(n, k, group_size) || m <= 0 || config >= CONFIGS) return 0;
    return TILES[plan_for(m, Shape{int(n), int(k), int(group_size)}, 1, config, type == scale_type).config]
        .scales_weights;
}

// Bytes of scratch memory that a product of m rows needs; it need not be cleared.
extern "C" int64_t sparse24_cuda_workspace_bytes(int64_t m, int64_t n, int64_t k, int64_t group_size, int sm_count,
                                                 int config) {
    if (!served(n, k, group_size) || m <= 0 || config >= CONFIGS) return 0;
    const Shape shape{int(n), int(k), int(group_size)};
    const int same = plan_for(m, shape, sm_count, config, true).splits,
              mixed = plan_for(m, shape, sm_count, config, false).splits;
    const int splits = same > mixed ? same : mixed;
    return splits > 1 ? int64_t(splits) * m * n * 4 : 0;
}

// y = x W' + bias. x: [m, k], 16-byte aligned, rows ldx apart (a multiple of 8); y: [m, n]; config -1 chooses by shape.
extern "C" int sparse24_cuda_linear(const void* x, int64_t ldx, int type, int64_t m, const void* packed, int64_t n,
                                    int64_t k, int64_t group_size, int scale_type, const void* bias, void* y,
                                    void* workspace, int config, int sm_count, void* stream) {
    const bool types = (type == BFLOAT16 || type == FLOAT16) && (scale_type == BFLOAT16 || scale_type == FLOAT16);
    if (!served(n, k, group_size) || !types || m < 0 || m > (1 << 24) || ldx < k || ldx > (1 << 23) || ldx % 8 ||
        config >= CONFIGS)
        return 1;
    if (reinterpret_cast<uintptr_t>(x) % 16 || reinterpret_cast<uintptr_t>(y) % 16) return 1;
    if (m == 0) return 0;
    const Shape shape{int(n), int(k), int(group_size)};
    const Plan plan = plan_for(m, shape, sm_count, config, type == scale_type);
    if (plan.splits > 1 && !workspace) return 1;
    const Arguments args{static_cast<const uint16_t*>(x),
                         static_cast<const uint8_t*>(packed),
                         static_cast<const uint16_t*>(bias),
                         static_cast<uint16_t*>(y),
                         static_cast<float*>(workspace),
                         shape,
                         int(ldx),
                         int(m),
                         scale_type,
                         plan.splits};
    return type == BFLOAT16 ? launch_config<__nv_bfloat16>(plan.config, args, stream)
                            : launch_config<__half>(plan.config, args, stream);
}

#include "sparse24_decode.h"
#include "sparse24_resources.h"
