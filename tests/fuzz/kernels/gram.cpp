// libFuzzer on kernels/cpu/gram.cpp: blocks of rows of any length, stride, type, level and order, and calls that it refuses.
#include "../../../kernels/cpu/gram.cpp"

#include <memory>
#include <vector>

#include "input.h"

namespace {

struct Blocks {
    std::vector<std::unique_ptr<Memory>> kept;
    std::vector<const void*> data;
    std::vector<int64_t> strides;

    Blocks(Input& in, bool guarded, const std::vector<int64_t>& rows, int64_t k, bool wide) {
        const size_t size = wide ? 4 : 2;
        for (const int64_t count : rows) {
            const int64_t stride = k + in.byte() % 9;
            kept.push_back(std::make_unique<Memory>(guarded, size_t(count ? (count - 1) * stride + k : 0) * size));
            Memory& one = *kept.back();
            if (in.byte() % 4)
                in.numbers(one.data(), one.bytes(), size, 0x3e);
            else
                in.fill(one.data(), one.bytes());
            data.push_back(one.data());
            strides.push_back(stride);
        }
    }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in(data, size);
    const int kind = in.byte(), level = forced_level() < 0 ? in.byte() % 6 : forced_level(),
              threads = 1 + in.byte() % 2;
    const int order = in.byte() % 3;
    const bool guarded = kind & 1, bad = kind % 16 == 0;
    const int64_t k = in.number(1, in.byte() % 8 ? 70 : 200), other = in.number(1, 120);
    std::vector<int64_t> rows;
    for (int left = int(in.number(1, 4)); left > 0; --left) rows.push_back(in.number(0, in.byte() % 8 ? 50 : 1100));
    const bool wide = in.yes(), other_wide = in.yes();
    const int64_t ldh = k + in.byte() % 5, count = int64_t(rows.size());
    Memory H(guarded, size_t((k - 1) * ldh + k) * 4), C(guarded, size_t(k * other) * 4);
    const Blocks a(in, guarded, rows, k, wide);
    if (in.yes()) {
        const int status = sparsify_gram(
            bad && in.yes() ? nullptr : a.data.data(), rows.data(), a.strides.data(), count, bad && in.yes() ? -k : k,
            wide, H.floats(), bad && in.yes() ? k - 1 : ldh, threads, level, bad ? int(in.byte()) - 100 : order);
        EXPECT(bad || status == kOk || status == kUnsupported || (wide && order && status == kBadArgument));
        if (status == kOk) EXPECT(sparsify_gram_mirror(H.floats(), k, ldh, threads) == kOk);
        return 0;
    }
    const Blocks b(in, guarded, rows, other, other_wide);
    const int status = sparsify_gram_cross(a.data.data(), a.strides.data(), k, wide, b.data.data(), b.strides.data(),
                                           other, other_wide, rows.data(), count, C.floats(), bad ? other - 1 : other,
                                           threads, level, bad ? int(in.byte()) - 100 : order);
    EXPECT(bad || status == kOk || status == kUnsupported || status == kBadArgument);
    return 0;
}
