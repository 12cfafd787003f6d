// y = x W' + b for a compressed linear W [N, K]: 2:4 sparse with 4, 8 or 16 bits, or dense with 4 or 8 bits.
//
// The work is split over pairs of panels, 32 outputs (sparse24_layout.h). A thread begins with the same ones in every call, whose
// memory it filled; which thread computes an output does not change it. Three families of kernels:
//
//   sparse24_bf16.h   amx, avx512bf16: bf16 products of every type of activation, summed in fp32; on request int8 (_int8.h)
//   sparse24_bytes.h  avx2, avxvnni, avx512: products of bytes in fixed point for every type of activation; on request int8
//   sparse24_f32.h    portable; 16-bit weights below avx512bf16, and many rows where `bytes_of` says so: fp32 products
//
// and in the first and the last family two kernels: `direct` for few rows, where the weights are read once, and for many
// rows decoding a piece of a panel into the first-level cache, which then serves all of them. On avx512bf16 many rows of a
// 2:4 linear are not multiplied with dense weights either (`select`). Few rows of bf16 may become fixed point: sparse24_fixed.h.
//
// sparse24_simd.h compiles the kernels for each instruction set, sparse24_run_*.h drive them over the rows of a call; here is
// which of them runs (`run`), and the C interface.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_features.h"
#include "levels.h"
#include "targets.h"

#if SPARSIFY_X86 && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms from within GCC 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "sparse24_call.h"
#include "sparse24_crossovers.h"
#include "sparse24_half.h"
#include "sparse24_layout.h"
#include "sparse24_run_bf16.h"
#include "sparse24_run_bytes.h"
#include "sparse24_run_f32.h"
#include "sparse24_run_fixed.h"
#include "sparse24_run_int8.h"
#include "sparse24_simd.h"
#include "sparse24_threads.h"
#include "sparse24_twin.h"

namespace sparse24 {

using namespace sparsify;  // the levels

// Options, added to a level: all but the fewest rows may be multiplied in int8; few rows, many rows or fixed point kernels
// whatever the number of rows (below avx512bf16, either of the first two: the fp32 kernels).
constexpr int kInt8 = 256, kForceDirect = 512, kForceTiles = 1024, kForceFixed = 2048, kFirstOption = kInt8;

// ------------------------------------------------------------------------------------------------------ dispatch

// `requested`, or -1 when this machine cannot run it; the fastest level of this machine for a request of -1.
static int best_level(int requested) {
    static const CpuFeatures& cpu = sparsify::cpu();
    static const bool bf16 = SPARSIFY_COMPILES_AVX512BF16 && cpu.avx512_bf16 && cpu.avx512_vbmi && cpu.avx512_vnni;
    static const bool amx = SPARSIFY_COMPILES_AMX && bf16 && cpu.amx_bf16 && cpu.amx_int8 && sparsify::request_amx();
    static const bool vnni = SPARSIFY_COMPILES_AVXVNNI && cpu.avx_vnni;
    const bool runs[kLevels] = {true, cpu.avx2, vnni, cpu.avx512, bf16, amx};
    for (int level = kLevels - 1; level >= 0; --level) {
        if (runs[level] && (requested < 0 || level == requested)) return level;
    }
    return -1;
}

static F32Kernels f32_kernels(const Layout& l, int level) {
#if SPARSIFY_X86
    if (level >= kAvx512) return avx512::kernels(l);
    if (level >= kAvx2) return avx2::kernels(l);
#endif
    return portable::kernels(l);
}

#if SPARSIFY_X86

constexpr int64_t kFewRows = 4;  // where products of bytes beat those of fp32 for few rows alone, most of these

static ByteKernels byte_kernels(const Layout& l, int parts, int level) {
#if SPARSIFY_COMPILES_AVXVNNI
    if (level == kAvxVnni) return avxvnni::byte_kernels(l, parts);
#endif
    (void)level;
    return avx2::byte_kernels(l, parts);
}

// Bytes of an activation as sparse24_bytes.h takes them, 0 where fp32 kernels serve.
static int bytes_of(const Call& call, int level, int options) {
    if (level < kAvx2 || !call.l.scaled() || options & (kForceDirect | kForceTiles)) return 0;
    if (options & kInt8 && call.rows >= kInt8Rows) return 1;
    const int bytes = call.type == kBf16 ? 2 : 3;
    const bool halves = call.l.bits == 8 && level != kAvxVnni;  // each product of a code is two
    const bool slower = (halves && (bytes == 3 || !call.l.sparse)) || (level == kAvx512 && bytes == 3);
    return slower && call.rows > kFewRows ? 0 : bytes;
}

#endif  // SPARSIFY_X86

#if SPARSIFY_COMPILES_AMX

// Whether AMX multiplies this call in fixed point.
static bool takes_fixed(const Call& call, int options) {
    if (call.type != kBf16 || options & (kForceDirect | kForceTiles) || !fixed::fits_tiles(call.l)) return false;
    if (options & kForceFixed) return true;
    if (options & kInt8 && call.rows >= first_int8_row(true)) return false;
    const int* rows = kFixedRows[scheme_index(call.l)];
    return call.rows >= rows[0] && call.rows <= rows[1];
}

#endif  // SPARSIFY_COMPILES_AMX

static int run(const Call& call, int level, int options) {
#if SPARSIFY_COMPILES_AVX512BF16
    const bool fits = call.l.bits < 16 || call.l.stored_type == kBf16;  // values in fp16 need fp32 products
    if (level >= kAvx512Bf16 && fits) {
        const bool amx = level == kAmx;
#if SPARSIFY_COMPILES_AMX
        if (amx && takes_fixed(call, options)) return run_fixed(call);
#endif
        const bool forced = options & (kForceDirect | kForceTiles);
        if (call.rows == 1 && call.type == kBf16 && call.l.sparse && call.l.bits == 4 && !forced)
            return run_one_fixed(call);
        if (options & kInt8 && !(options & kForceDirect) && call.l.scaled() && call.rows >= first_int8_row(amx))
            return run_int8(call, amx);
        const int64_t rows = call.rows * (call.l.sparse || call.l.bits == 4 ? parts_of(call.type) : 1);
        const int64_t limit = options & kForceDirect  ? bf16::kMaxDirectRows
                              : options & kForceTiles ? 0
                                                      : kDirectRows[amx][scheme_index(call.l)];
        if (rows <= std::min<int64_t>(bf16::kMaxDirectRows, limit)) return run_direct(call);
        return run_tiles(call, amx);
    }
#endif
#if SPARSIFY_X86
    if (const int bytes = bytes_of(call, level, options))
        return run_blocks(call, BytesBlocks{call, byte_kernels(call.l, bytes, level), bytes});
#endif
    (void)options;
    return run_f32(call, f32_kernels(call.l, level));
}

}  // namespace sparse24

// ------------------------------------------------------------------------------------------------------ interface

extern "C" {

// The level that `requested` (0 portable, 1 avx2, 2 avxvnni, 3 avx512, 4 avx512bf16, 5 amx; -1 the fastest) comes to here, -1 if this
// machine cannot run it.
int sparse24_level(int requested) { return sparse24::best_level(requested); }

// Bytes of the packed form, -1 when no kernel runs such a linear. stored_type: of scales or values, 0 bf16, 1 fp16.
int64_t sparse24_packed_bytes(int64_t n, int64_t k, int bits, int64_t group, int sparse, int stored_type) {
    sparse24::Layout l;
    return sparse24::make_layout(n, k, bits, group, sparse != 0, stored_type, &l) ? l.total_bytes : -1;
}

// Repack a checkpoint's tensors (sizes and contents already checked). Each thread writes, and so places in its memory, the
// pairs that it will read. `out`: 64-byte aligned.
int sparse24_pack(int64_t n, int64_t k, int bits, int64_t group, int sparse, int stored_type, const void* packed,
                  const void* meta, const void* scale, const void* values, void* out) {
    using namespace sparse24;
    Layout l;
    if (!make_layout(n, k, bits, group, sparse != 0, stored_type, &l)) return kBadArgument;
    const Source source{static_cast<const uint8_t*>(packed), static_cast<const uint8_t*>(meta),
                        static_cast<const uint16_t*>(scale), static_cast<const uint16_t*>(values)};
    uint8_t* blob = static_cast<uint8_t*>(out);
    const Header header{kMagic, n, k, l.group, bits, l.sparse, stored_type, 0};
    want_huge_pages(blob, l.total_bytes);
    std::memset(blob, 0, kHeader);
    std::memcpy(blob, &header, sizeof header);
    in_threads(n * k, [&](int thread, int threads) {
        const Range pairs = part(l.pairs, thread, threads);
        for (int64_t p = pairs.begin; p < pairs.end; ++p) pack_pair(l, source, p, blob);
    });
    return kOk;
}

// The options of calls that give none.
void sparse24_set_options(void* packed, int options) {
    sparse24::Header header;
    std::memcpy(&header, packed, sizeof header);
    header.options = options;
    std::memcpy(packed, &header, sizeof header);
}

// y [rows, n] = x [rows, k] W' + bias. type: of x and y, 0 bf16, 1 fp16, 2 fp32; ldx: elements between rows of x; bias: n
// values of bias_type, or null; options: the level plus 1, plus kInt8 and others
// (above); 0: as set for this linear, else the fastest level.
int sparse24_linear(const void* packed, int64_t packed_bytes, const void* x, int type, int64_t rows, int64_t k,
                    int64_t ldx, const void* bias, int bias_type, void* y, int64_t n, int options) {
    using namespace sparse24;
    Call call;
    if (!read_layout(static_cast<const uint8_t*>(packed), packed_bytes, &call.l)) return kBadArgument;
    if (call.l.k != k || call.l.n != n || rows < 0 || type < kBf16 || type > kF32 || (rows > 1 && ldx < k))
        return kBadArgument;
    if (options == 0) options = reinterpret_cast<const Header*>(packed)->options;
    const int chosen = best_level(options % kFirstOption - 1);
    if (chosen < 0) return kUnsupported;
    if (rows == 0) return kOk;
    call.blob = static_cast<const uint8_t*>(packed);
    call.x = x, call.type = type, call.rows = rows, call.ldx = ldx;
    call.bias = bias, call.bias_type = bias_type, call.y = y;
    return run(call, chosen, options);
}

// As sparse24_linear, by the plain loops of sparse24_twin.h, one thread; for linears with scales. way: one of twin::Way.
int sparse24_twin(const void* packed, int64_t packed_bytes, const void* x, int type, int64_t rows, int64_t k,
                  int64_t ldx, const void* bias, int bias_type, void* y, int64_t n, int way) {
    using namespace sparse24;
    Call call;
    if (!read_layout(static_cast<const uint8_t*>(packed), packed_bytes, &call.l) || !call.l.scaled())
        return kBadArgument;
    if (call.l.k != k || call.l.n != n || type < kBf16 || type > kF32 || way < 0 || way >= twin::kTwinWays)
        return kBadArgument;
    call.blob = static_cast<const uint8_t*>(packed);
    call.x = x, call.type = type, call.rows = rows, call.ldx = ldx;
    call.bias = bias, call.bias_type = bias_type, call.y = y;
    std::vector<float> row(static_cast<size_t>(k)), sums(static_cast<size_t>(call.l.pairs * kPair));
    for (int64_t m = 0; m < rows; ++m) {
        widen_row(call, m, k, row.data());
        twin::multiply(call.l, call.blob, row, way, type == kBf16 ? 2 : 3, sums.data());
        for (int64_t p = 0; p < call.l.pairs; ++p) finish_f32(call, p, m, sums.data() + p * kPair);
    }
    return kOk;
}

}  // extern "C"
