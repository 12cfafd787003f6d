// libFuzzer on kernels/cpu/softmax.cpp: any scores in tiles of any size. What a query does not see is 0, what it sees is a
// probability or, in a row that is not finite, NaN.
#include "../../../kernels/cpu/softmax.cpp"

#include <cmath>

#include "input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in(data, size);
    const int kind = in.byte(), level = forced_level() < 0 ? in.byte() % 7 - 1 : forced_level(),
              threads = 1 + in.byte() % 2;
    const int64_t queries = in.number(1, 40), rows = queries * in.number(1, 3),
                  columns = in.number(queries, in.byte() % 4 ? queries + 70 : queries + 700);
    Memory scores(kind & 1, size_t(rows * columns) * 2);
    if (in.byte() % 4)
        in.numbers(scores.data(), scores.bytes(), 2, 0x3f);
    else
        in.fill(scores.data(), scores.bytes());
    auto* values = reinterpret_cast<uint16_t*>(scores.data());
    EXPECT(sparsify_causal_softmax(values, rows, columns, queries, threads, level) == 0);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
            const float p = widen(values[r * columns + c]);
            if (c > columns - queries + r % queries)
                EXPECT(p == 0);
            else
                EXPECT(std::isnan(p) || (p >= 0 && p <= 1));
        }
    return 0;
}
