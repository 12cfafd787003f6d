// libFuzzer on kernels/cpu/{alps,column_sweep,coordinate_descent}.cpp: any numbers, NaN and infinities too, in every way that the
// solver calls them (sparsify/solver/native_sweep.py).
#include "../../../kernels/cpu/alps.cpp"
#include "../../../kernels/cpu/column_sweep.cpp"
#include "../../../kernels/cpu/coordinate_descent.cpp"

#include "input.h"

namespace {

constexpr int kDropped[3] = {0, 13, 16};
constexpr float kTiny = 1.17549435e-38f, kLargest[3] = {3.4028235e38f, 65504.0f, 3.3895314e38f};

// A matrix of fp32 of which `columns` of each row are used.
struct Matrix {
    int64_t stride;
    Memory buffer;
    Matrix(Input& in, bool guarded, int64_t rows, int64_t columns, bool any)
        : stride(columns + in.byte() % 9), buffer(guarded, size_t(rows ? (rows - 1) * stride + columns : 0) * 4) {
        if (any)
            in.fill(buffer.data(), buffer.bytes());
        else
            in.numbers(buffer.data(), buffer.bytes(), 4, 0x3e);
    }
    float* data() const { return buffer.floats(); }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in(data, size);
    const int kind = in.byte(), level = forced_level() < 0 ? in.byte() % 7 - 1 : forced_level(),
              threads = 1 + in.byte() % 2;
    const bool guarded = kind & 1, any = in.byte() % 3 == 0;
    const int64_t outputs = in.number(1, in.byte() % 8 ? 70 : 300);
    const int quads = int(in.number(1, 32)), bits = in.yes() ? 4 : 8, type = in.byte() % 3;
    const float low = -float(1 << (bits - 1)), high = -low - 1;
    const bool grid = in.yes(), zeros = in.yes(), mask = in.yes(), select = !mask && in.yes();
    // A group has any number of inputs where nothing is chosen of four.
    const int panel = 4 * quads - (select || quads == 1 ? 0 : in.byte() % 4);
    Matrix P(in, guarded, panel, outputs, any), E(in, guarded, panel, outputs, any),
        square(in, guarded, panel, panel, any);
    Matrix scale(in, guarded, panel, outputs, any), zero(in, guarded, panel, outputs, false);
    for (int64_t i = 0; i < int64_t(zero.buffer.bytes() / 4); ++i) zero.data()[i] = float(int(in.byte() % 16) - 8);
    Memory keep(guarded, size_t(panel * outputs)), codes(guarded, size_t(panel * outputs));
    in.fill(keep.data(), keep.bytes());
    for (size_t i = 0; i < keep.bytes(); ++i) keep.data()[i] &= 1;
    switch (kind / 2 % 5) {
        case 0: {
            const int first = select ? int(4 * in.number(0, quads - 1)) : int(in.number(0, panel - 1));
            const int last =
                select ? first + int(4 * in.number(1, quads - first / 4)) : int(in.number(first + 1, panel));
            const int64_t rows = in.yes() ? 1 : last - first;  // of scales
            Memory units(guarded, size_t(rows * outputs) * 4), points(guarded, size_t(rows * outputs) * 4);
            in.numbers(units.data(), units.bytes(), 4, 0x3c);
            for (int64_t i = 0; i < rows * outputs; ++i) points.floats()[i] = float(int(in.byte() % 16) - 8);
            sparsify_sweep_block(P.data(), P.stride, E.data(), E.stride, square.data(), square.stride, panel, first,
                                 last, outputs, grid ? units.floats() : nullptr,
                                 grid && zeros ? points.floats() : nullptr, rows == 1 ? 0 : outputs, low, high,
                                 grid ? reinterpret_cast<int8_t*>(codes.data()) : nullptr, grid ? outputs : 0,
                                 mask ? keep.data() : nullptr, mask ? outputs : 0, select, in.yes(), threads, level);
            break;
        }
        case 1: {
            const int tries = int(in.number(1, 12));
            Memory d(guarded, size_t(panel) * 4), weight(guarded, size_t(panel) * 4),
                ratios(guarded, size_t(tries) * 4);
            Memory found(guarded, size_t(outputs) * 4), points(guarded, size_t(outputs) * 4);
            in.fill(d.data(), d.bytes());
            in.fill(weight.data(), weight.bytes());
            in.numbers(ratios.data(), ratios.bytes(), 4, 0x3e);
            sparsify_search_scale(P.data(), P.stride, panel, outputs, d.floats(), weight.floats(), ratios.floats(),
                                  tries, low, high, kDropped[type], kTiny, kLargest[type], mask ? keep.data() : nullptr,
                                  mask ? outputs : 0, select, found.floats(), zeros ? points.floats() : nullptr,
                                  threads, level);
            break;
        }
        case 2:
            sparsify_visit_block(P.data(), P.stride, E.data(), E.stride, square.data(), square.stride, panel, outputs,
                                 grid ? scale.data() : nullptr, grid && zeros ? zero.data() : nullptr, low, high,
                                 mask ? keep.data() : nullptr, mask ? outputs : 0, select, in.yes(), threads, level);
            break;
        case 3: {
            const int64_t inputs = 4 * quads, bytes = outputs * inputs * 4;
            Memory W(guarded, size_t(bytes)), pull(guarded, size_t(bytes)), V(guarded, size_t(bytes)),
                kept(guarded, size_t(outputs * inputs));
            for (Memory* one : {&W, &pull, &V}) in.numbers(one->data(), one->bytes(), 4, 0x3e);
            if (any) in.fill(W.data(), W.bytes());
            sparsify_alps_round(W.floats(), pull.floats(), 0.1f, V.floats(), kept.data(), outputs, inputs, threads,
                                level);
            break;
        }
        default:
            sparsify_refit_scale(P.data(), P.stride, E.data(), E.stride, square.data(), square.stride, panel, outputs,
                                 scale.data(), kDropped[type], kTiny, kLargest[type], threads, level);
    }
    return 0;
}
