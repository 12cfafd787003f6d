// Runs every level and scheme of kernels/cpu/sparse24.cpp under the address and undefined-behaviour sanitizers
// (tests/kernels/test_sparse24.py compiles and runs it). Every buffer has exactly the size that the interface asks for and
// comes in two kinds: from the heap, where the sanitizer sees ordinary loads and stores, and at the end of a page that an
// unreadable one follows, where the processor also sees masked vectors and AMX tiles, which the sanitizer does not instrument.
#include "../../kernels/cpu/sparse24.cpp"

#include <cstdio>
#include <vector>

#include <sys/mman.h>

namespace {

class Buffer {
  public:
    enum Kind { kHeap, kGuarded };

    Buffer(Kind kind, size_t bytes, bool aligned = false) : kind_(kind), bytes_(bytes) {
        if (kind == kHeap) {
            data = static_cast<uint8_t*>(aligned ? std::aligned_alloc(64, bytes) : std::malloc(bytes));
        } else {
            mapped_ = (bytes + kPage - 1) / kPage * kPage + kPage;
            start_ = static_cast<uint8_t*>(
                mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            if (start_ == MAP_FAILED || mprotect(start_ + mapped_ - kPage, kPage, PROT_NONE)) std::abort();
            data = start_ + mapped_ - kPage - bytes;
        }
        if (data == nullptr) std::abort();
    }
    ~Buffer() {
        if (kind_ == kHeap)
            std::free(data);
        else
            munmap(start_, mapped_);
    }
    Buffer(const Buffer&) = delete;

    size_t bytes() const { return bytes_; }
    uint8_t* data;

  private:
    static constexpr size_t kPage = 4096;
    Kind kind_;
    size_t bytes_, mapped_ = 0;
    uint8_t* start_ = nullptr;
};

uint32_t state = 1;
uint32_t next_random() { return state = state * 1664525u + 1013904223u, state >> 8; }

void fill_random(Buffer& b) {
    for (size_t i = 0; i < b.bytes(); ++i) b.data[i] = uint8_t(next_random());
}

// Finite numbers of either sign around 1: bf16 and fp16 by their upper bytes, fp32 by its uppermost.
void fill_numbers(Buffer& b, int type) {
    fill_random(b);
    const size_t size = type == sparse24::kF32 ? 4 : 2;
    for (size_t i = size - 1; i < b.bytes(); i += size)
        b.data[i] = uint8_t((b.data[i] & 0x80) | (type == sparse24::kF16 ? 0x38 : 0x3e));
}

// Two positions of every quad, ascending: any of the six.
void fill_positions(Buffer& b) {
    const uint8_t pairs[6] = {0 | 1 << 2, 0 | 2 << 2, 0 | 3 << 2, 1 | 2 << 2, 1 | 3 << 2, 2 | 3 << 2};
    for (size_t i = 0; i < b.bytes(); ++i)
        b.data[i] = uint8_t(pairs[next_random() % 6] | pairs[next_random() % 6] << 4);
}

int failures = 0;
long calls = 0;

void expect(bool good, const char* what, int64_t n, int64_t k, int bits, int level, int type, int64_t rows) {
    if (good) return;
    std::printf("%s: n %ld k %ld bits %d level %d type %d rows %ld\n", what, long(n), long(k), bits, level, type,
                long(rows));
    ++failures;
}

// The plain loops on what the kernels were given, few rows of it.
void run_twin(int64_t n, int64_t k, int bits, int64_t bytes, const Buffer& blob, int type, Buffer::Kind kind) {
    Buffer x(kind, size_t(2 * k) * (type == sparse24::kF32 ? 4 : 2)),
        y(kind, size_t(2 * n) * (type == sparse24::kF32 ? 4 : 2));
    fill_numbers(x, type);
    for (int way = 0; way < sparse24::twin::kTwinWays; ++way) {
        const int code = sparse24_twin(blob.data, bytes, x.data, type, 2, k, k, nullptr, 0, y.data, n, way);
        expect(code == (bits == 16 ? 1 : 0), "twin", n, k, bits, way, type, 2);
        ++calls;
    }
}

void run_linear(int64_t n, int64_t k, int bits, int64_t group, bool sparse, int stored_type, Buffer::Kind kind,
                const std::vector<int64_t>& all_rows) {
    const int64_t stored = sparse ? k / 2 : k, bytes = sparse24_packed_bytes(n, k, bits, group, sparse, stored_type);
    if (bytes < 0) std::abort();
    Buffer codes(kind, size_t(n * stored * bits / 8)), meta(kind, size_t(n * k / 8)),
        scales(kind, size_t(n * (k / group) * 2));
    Buffer blob(kind, size_t(bytes), true);
    bits == 16 ? fill_numbers(codes, stored_type) : fill_random(codes);
    fill_positions(meta);
    fill_numbers(scales, stored_type);
    const bool floats = bits == 16;
    const int status = sparse24_pack(n, k, bits, group, sparse, stored_type, floats ? nullptr : codes.data,
                                     sparse ? meta.data : nullptr, floats ? nullptr : scales.data,
                                     floats ? codes.data : nullptr, blob.data);
    expect(status == 0, "pack refused", n, k, bits, -1, -1, 0);
    for (int level = 0; level < sparse24::kLevels; ++level) {
        if (sparse24_level(level) < 0) continue;
        for (int type = 0; type < 3; ++type) {
            if (level == 0) run_twin(n, k, bits, bytes, blob, type, kind);
            for (const int64_t rows : all_rows) {
                const size_t size = type == sparse24::kF32 ? 4 : 2;
                const int bias_type = int((rows + type) % 4);  // 3: no bias
                const int64_t ldx = k + (rows % 3) * 7;        // rows apart, the last one ends the buffer
                Buffer x(kind, size_t((rows - 1) * ldx + k) * size), y(kind, size_t(rows * n) * size);
                Buffer bias(kind, size_t(n) * (bias_type == sparse24::kF32 ? 4 : 2));
                fill_numbers(x, type);
                fill_numbers(bias, bias_type == 3 ? 0 : bias_type);
                for (const int way :
                     {0, sparse24::kInt8, sparse24::kForceDirect, sparse24::kForceTiles, sparse24::kForceFixed}) {
                    if (way && level == sparse24::kPortable) continue;
                    if (way > sparse24::kForceDirect && level < sparse24::kAvx512Bf16)
                        continue;  // the same as it or as 0
                    if (way > sparse24::kInt8 && rows > (way == sparse24::kForceFixed ? 65 : 9))
                        continue;  // the same as 0
                    std::memset(y.data, 0xff, y.bytes());
                    const int code =
                        sparse24_linear(blob.data, bytes, x.data, type, rows, k, ldx,
                                        bias_type == 3 ? nullptr : bias.data, bias_type, y.data, n, level + 1 + way);
                    expect(code == 0, "refused", n, k, bits, level, type, rows);
                    bool finite = true;  // 0xffff is a NaN in every type: an output that was not written shows
                    for (int64_t i = 0; i < rows * n; ++i) {
                        const float value = sparse24::to_float(y.data, type, i);
                        finite = finite && value - value == 0;
                    }
                    expect(finite, "an output is missing or not finite", n, k, bits, level, type, rows);
                    ++calls;
                }
            }
        }
    }
}

// What is too short for its header, or does not have the size that the header says, is refused without reading past it.
void damaged_blobs(Buffer::Kind kind) {
    const int64_t n = 17, k = 48, bytes = sparse24_packed_bytes(n, k, 4, k, 1, 0);
    Buffer whole(kind, size_t(bytes), true), codes(kind, size_t(n * k / 4)), meta(kind, size_t(n * k / 8)),
        scales(kind, size_t(n * 2));
    fill_random(codes);
    fill_positions(meta);
    fill_numbers(scales, 0);
    sparse24_pack(n, k, 4, k, 1, 0, codes.data, meta.data, scales.data, nullptr, whole.data);
    Buffer x(kind, size_t(k) * 2), y(kind, size_t(n) * 2);
    fill_numbers(x, 0);
    for (const int64_t size :
         {int64_t(0), int64_t(1), int64_t(8), int64_t(63), int64_t(64), int64_t(65), bytes / 2, bytes - 1}) {
        Buffer cut(kind, size_t(size));
        std::memcpy(cut.data, whole.data, size_t(size));
        expect(sparse24_linear(cut.data, size, x.data, 0, 1, k, k, nullptr, 0, y.data, n, 0) == 1,
               "took a damaged blob", n, k, 4, -1, 0, size);
        ++calls;
    }
}

}  // namespace

int main() {
    struct Scheme {
        int bits;
        bool sparse;
    };
    const Scheme schemes[] = {{4, true}, {8, true}, {16, true}, {4, false}, {8, false}};
    struct Shape {
        int64_t n, k, group;
    };
    const Shape shapes[] = {{1, 16, 16}, {17, 48, 48}, {33, 128, 32}, {48, 128, 64}, {15, 256, 128}};
    for (const Buffer::Kind kind : {Buffer::kHeap, Buffer::kGuarded}) {
        for (const Scheme& s : schemes) {
            for (const Shape& shape : shapes) {
                const int64_t group = s.bits == 16 ? shape.k : shape.group;
                const std::vector<int64_t> rows = {1, 2, 3, 4, 5, 8, 9, 17, 33, 65, 81, 300};
                for (int stored = 0; stored < 2; ++stored)
                    run_linear(shape.n, shape.k, s.bits, group, s.sparse, stored, kind, rows);
            }
            run_linear(17, 2176, s.bits, s.bits == 16 ? 2176 : 128, s.sparse, 0, kind,
                       {1, 5, 300});  // more than one pass over K
        }
        damaged_blobs(kind);
    }
    std::printf("%ld calls, %d failures\n", calls, failures);
    return failures != 0;
}
