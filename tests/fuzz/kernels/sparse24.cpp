// libFuzzer on kernels/cpu/sparse24.cpp: linears of any shape, scheme, type and level, and packed weights that are damaged.
#include "../../../kernels/cpu/sparse24.cpp"

#include "input.h"

namespace {

constexpr int kTop[3] = {0x3e, 0x38, 0x3e};  // upper bytes of bf16, fp16 and fp32 around 1

size_t size_of(int type) { return type == sparse24::kF32 ? 4 : 2; }

struct Linear {
    int64_t n, k, group, bytes;
    int bits, stored_type;
    bool sparse;
};

Linear linear_of(Input& in) {
    const int64_t groups[] = {32, 64, 128, 256};
    const int64_t bits[] = {4, 8, 16};
    Linear l;
    l.n = in.number(1, 100), l.k = 16 * in.number(1, in.byte() % 8 ? 20 : 140);
    l.bits = int(in.one_of(bits)), l.sparse = l.bits == 16 || in.yes(), l.stored_type = in.byte() % 2;
    l.group = in.one_of(groups);
    if (l.bits == 16 || l.k % l.group) l.group = l.k;
    l.bytes = sparse24_packed_bytes(l.n, l.k, l.bits, l.group, l.sparse, l.stored_type);
    return l;
}

void pack(Input& in, const Linear& l, bool guarded, Memory& blob) {
    const int64_t stored = l.sparse ? l.k / 2 : l.k;
    Memory codes(guarded, size_t(l.n * stored * l.bits / 8)), meta(guarded, size_t(l.n * l.k / 8)),
        scales(guarded, size_t(l.n * (l.k / l.group) * 2));
    const bool floats = l.bits == 16;
    if (floats)
        in.numbers(codes.data(), codes.bytes(), 2, kTop[l.stored_type]);
    else
        in.fill(codes.data(), codes.bytes());
    in.fill(meta.data(), meta.bytes());  // any nibbles, those too that no checkpoint may hold
    in.numbers(scales.data(), scales.bytes(), 2, kTop[l.stored_type]);
    EXPECT(sparse24_pack(l.n, l.k, l.bits, l.group, l.sparse, l.stored_type, floats ? nullptr : codes.data(),
                         l.sparse ? meta.data() : nullptr, floats ? nullptr : scales.data(),
                         floats ? codes.data() : nullptr, blob.data()) == 0);
}

// Calls the kernels with x and y of exactly the sizes that the interface asks for. Returns their status.
int call(Input& in, const uint8_t* blob, int64_t bytes, int64_t n, int64_t k, bool guarded, bool finite) {
    const int64_t ways[] = {0,
                            sparse24::kInt8,
                            sparse24::kForceDirect,
                            sparse24::kForceTiles,
                            sparse24::kForceFixed,
                            sparse24::kInt8 | sparse24::kForceTiles,
                            sparse24::kInt8 | sparse24::kForceFixed};
    const int level = forced_level() < 0 ? in.byte() % sparse24::kLevels : forced_level();
    const int type = in.byte() % 3, bias_type = in.byte() % 4;  // 3: no bias
    const int64_t rows = in.number(0, in.byte() % 16 ? 12 : 140), ldx = k + in.byte() % 20, way = in.one_of(ways);
    Memory x(guarded, rows ? size_t((rows - 1) * ldx + k) * size_of(type) : 0);
    Memory y(guarded, size_t(rows * n) * size_of(type)), bias(guarded, size_t(n) * size_of(bias_type % 3));
    in.numbers(x.data(), x.bytes(), size_of(type), kTop[type]);
    in.numbers(bias.data(), bias.bytes(), size_of(bias_type % 3), kTop[bias_type % 3]);
    std::memset(y.data(), 0xff, y.bytes());
    const int status =
        sparse24_linear(blob, bytes, x.data(), type, rows, k, ldx, bias_type == 3 ? nullptr : bias.data(),
                        bias_type % 3, y.data(), n, int(level + 1 + way));
    if (status == 0 && finite) {  // 0xffff is a NaN in every type: an output that was not written shows
        for (int64_t i = 0; i < rows * n; ++i) {
            const float value = sparse24::to_float(y.data(), type, i);
            EXPECT(value - value == 0 || type == sparse24::kF16);
        }
    }
    if (status == 0 && rows > 0 && rows < 5) {
        const int way_of_twin = in.byte() % (sparse24::twin::kTwinWays + 1);
        sparse24_twin(blob, bytes, x.data(), type, rows, k, ldx, bias_type == 3 ? nullptr : bias.data(), bias_type % 3,
                      y.data(), n, way_of_twin);
    }
    return status;
}

// A packed weight of a good size, of which a few bytes are others, the header's mostly; or bytes that never were one.
void damaged(Input& in, bool guarded) {
    const Linear l = linear_of(in);
    EXPECT(l.bytes > 0);
    Memory whole(false, size_t(l.bytes), true);
    pack(in, l, false, whole);
    const int64_t size = in.byte() % 3 ? l.bytes : in.number(0, l.bytes - 1);
    Memory blob(guarded, size_t(size), true);
    std::memcpy(blob.data(), whole.data(), size_t(size));
    for (int changes = in.byte() % 6; changes > 0 && size; --changes) {
        const int64_t at = in.yes() ? in.number(0, 63) : in.number(0, size - 1);
        blob.data()[at % size] ^= in.byte();
    }
    sparse24::Layout read;
    int64_t n = l.n, k = l.k;
    if (in.yes() && sparse24::read_layout(blob.data(), size, &read)) n = read.n, k = read.k;
    call(in, blob.data(), size, n, k, guarded, false);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in(data, size);
    const int kind = in.byte();
    const bool guarded = kind & 1;
    if (kind % 5 == 0) {
        damaged(in, guarded);
        return 0;
    }
    const Linear l = linear_of(in);
    EXPECT(l.bytes > 0);
    Memory blob(guarded, size_t(l.bytes), true);
    pack(in, l, guarded, blob);
    const int status = call(in, blob.data(), l.bytes, l.n, l.k, guarded, true);
    EXPECT(status == 0 || status == sparse24::kUnsupported);
    return 0;
}
