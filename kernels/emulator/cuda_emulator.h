// Lets g++ compile a .cu of this project as a program for the CPU that means what the GPU would do, and says so when the GPU
// would do something undefined:
//
//     g++ -std=c++17 -O2 -fPIC -shared -x c++ -DSPARSIFY_EMULATOR -Wno-unknown-pragmas kernels/cuda/NAME.cu -o NAME.so
//
// The library has the C interface of the .cu and the functions emulator_* at the end of this file. Pointers are host
// pointers to ranges that were registered. A kernel must use the functions in warp.h for everything that is not plain C++.
// One source file per library may include this.
//
//   numbers.h   bf16 and fp16
//   fibers.h    threads
//   memory.h    shared and global memory, races
//   banks.h     conflicts in the banks of shared memory, counted
//   machine.h   blocks, warps, barriers, divergence
//   warp.h      the instructions
#pragma once

#include <stdint.h>

#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "warp.h"

// ------------------------------------------------------------------------------------------------- the language
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (emulator::machine().thread().index)
#define blockIdx (emulator::machine().block_index)
#define blockDim (emulator::machine().block_size)
#define gridDim (emulator::machine().grid_size)

#define SPARSIFY_VECTORS(type, name)                                 \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
SPARSIFY_VECTORS(int, int)
SPARSIFY_VECTORS(unsigned, uint)
SPARSIFY_VECTORS(float, float)
#undef SPARSIFY_VECTORS

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }

using emulator::atomic_add;
using emulator::block_barrier;
using emulator::cp_async_16;
using emulator::cp_async_commit;
using emulator::cp_async_wait;
using emulator::fma2;
using emulator::global_load;
using emulator::global_store;
using emulator::ldmatrix_x4;
using emulator::lop3_and_or;
using emulator::mma_sp;
using emulator::shared_load;
using emulator::shared_store;
using emulator::shuffle_down;
using emulator::shuffle_xor;
using emulator::thread_fence;
using emulator::warp_barrier;

inline uint32_t load_nc_u32(const void* global) { return emulator::load<uint32_t>("load_nc_u32", global, true); }
inline uint4 load_nc_u128(const void* global) { return emulator::load<uint4>("load_nc_u128", global, true); }

inline uint8_t* extern_shared() { return emulator::machine().shared.base(); }

// ------------------------------------------------------------------------------------------------- the runtime
typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulator {

static std::vector<std::pair<const void*, size_t>> shared_allowances;  // by kernel, see cudaFuncSetAttribute

inline size_t& shared_allowance(const void* kernel) {
    for (auto& known : shared_allowances)
        if (known.first == kernel) return known.second;
    shared_allowances.emplace_back(kernel, 0);
    return shared_allowances.back().second;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
            Arguments&&... arguments) {
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    } const call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
    machine().launch(
        name, grid, block, shared_bytes, shared_allowance(reinterpret_cast<const void*>(kernel)),
        [](const void* that) {
            const Call& made = *static_cast<const Call*>(that);
            std::apply(made.kernel, made.arguments);
        },
        &call);
}

}  // namespace emulator

#define SPARSIFY_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    emulator::launch(#kernel, kernel, grid, block, size_t(shared_bytes), stream, __VA_ARGS__)

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
    if (value < 0 || size_t(value) > emulator::kSharedAtMost) return cudaErrorInvalidValue;
    emulator::shared_allowance(reinterpret_cast<const void*>(kernel)) = size_t(value);
    return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
    return emulator::machine().global.fill(pointer, value, bytes) ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaGetLastError() { return *emulator::machine().error() ? cudaErrorLaunchFailure : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? emulator::machine().error() : "no error"; }

// ------------------------------------------------------------------------------------------------- for tests
extern "C" {

// Global memory: only these ranges exist. A byte of an uninitialised one must be written before it is read.
inline __attribute__((used)) void emulator_register(const void* pointer, size_t bytes) {
    emulator::machine().global.add(pointer, bytes, true);
}
inline __attribute__((used)) void emulator_register_uninitialized(const void* pointer, size_t bytes) {
    emulator::machine().global.add(pointer, bytes, false);
}
inline __attribute__((used)) void emulator_unregister(const void* pointer) {
    emulator::machine().global.remove(pointer);
}

// What ended a launch, or "". Nothing is launched until it is cleared.
inline __attribute__((used)) const char* emulator_error() { return emulator::machine().error(); }
inline __attribute__((used)) void emulator_clear_error() { emulator::machine().clear_error(); }

// 0: blocks run in ascending order, 1: descending.
inline __attribute__((used)) void emulator_block_order(int order) { emulator::machine().set_block_order(order); }

// What ran since the counters were reset.
inline __attribute__((used)) void emulator_counters(emulator::Counters* counters) {
    *counters = emulator::machine().counters;
}
inline __attribute__((used)) void emulator_reset_counters() { emulator::machine().counters = {}; }
}
