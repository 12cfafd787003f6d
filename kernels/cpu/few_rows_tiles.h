// The product of few_rows.cpp, which includes this once for each instruction set, with its vector instructions as `V`.

// A register tile holds kOutputs outputs of kTile rows of X: kOutputs x V::kMost sums, and as much as fits beside them.
constexpr int kOutputs = 4;
constexpr int kTile = V::kMost * V::kWidth;
constexpr int kBlock = 64;  // outputs that a thread takes at once
constexpr int kPart =
    256;  // inputs, at most: so many of a tile of X stay in the nearest caches for all outputs of a block

template <int N>
struct Tile {
    typename V::F at[kOutputs][N];

    INLINE void load(const float* sums) {
#pragma GCC unroll 4
        for (int m = 0; m < kOutputs; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) at[m][n] = V::load(sums + m * kTile + V::kWidth * n);
    }
    INLINE void store(float* sums) const {
#pragma GCC unroll 4
        for (int m = 0; m < kOutputs; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) V::store(sums + m * kTile + V::kWidth * n, at[m][n]);
    }
    // One input: w[m][k] is of output m.
    INLINE void step(const float* const* w, const float* x, int64_t k) {
        typename V::F right[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) right[n] = V::load(x + k * kTile + V::kWidth * n);
#pragma GCC unroll 4
        for (int m = 0; m < kOutputs; ++m) {
            const typename V::F left = V::broadcast(w[m] + k);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) at[m][n] = V::fma(left, right[n], at[m][n]);
        }
    }
};

// What will be wanted next of the rows of W lies `distance` elements on. Each of `turns` tiles prefetches every turns-th cache
// line of it, beginning with number `turn`, so that memory has the time of all tiles; none does if the distance is 0.
struct Ahead {
    int64_t distance;
    int turn, turns;
};

// sums[m][0 ... N) += sum over the inputs of w[m * ldw + k] x[k]
template <int N>
INLINE void add_tile(const float* w, int64_t ldw, const float* x, int inputs, float* sums, const Ahead& ahead) {
    const float* const of[kOutputs] = {w, w + ldw, w + 2 * ldw, w + 3 * ldw};
    Tile<N> tile;
    tile.load(sums);
    int64_t k = 0;
    int wait = ahead.distance ? ahead.turn : -1;
    for (; k + kLine <= inputs; k += kLine) {
        if (wait-- == 0) {
            for (const float* row : of)
                _mm_prefetch(reinterpret_cast<const char*>(row + k + ahead.distance), _MM_HINT_T1);
            wait = ahead.turns - 1;
        }
#pragma GCC unroll 4
        for (int i = 0; i < kLine; ++i) tile.step(of, x, k + i);
    }
    for (; k < inputs; ++k) tile.step(of, x, k);
    tile.store(sums);
}

// As add_tile, for a tile of X of which so many rows exist.
inline void add(const float* w, int64_t ldw, const float* x, int inputs, float* sums, const Ahead& ahead, int rows) {
    if (rows <= V::kWidth) return add_tile<1>(w, ldw, x, inputs, sums, ahead);
    if (rows <= 2 * V::kWidth) return add_tile<2>(w, ldw, x, inputs, sums, ahead);
    if (rows <= 3 * V::kWidth) return add_tile<3>(w, ldw, x, inputs, sums, ahead);
    add_tile<V::kMost>(w, ldw, x, inputs, sums, ahead);
}

// Rows tile * kTile ... of X as [inputs][kTile]; rows that do not exist are zero.
inline void pack(const Linear& l, int64_t tile, float* packed) {
    const int n = int(std::min<int64_t>(kTile, l.rows - tile * kTile));
    const float* x = l.x + tile * kTile * l.ldx;
    for (int64_t first = 0; first < l.inputs; first += kLine) {
        const int64_t last = std::min(first + kLine, l.inputs);
        for (int r = 0; r < kTile; ++r)
            for (int64_t k = first; k < last; ++k) packed[k * kTile + r] = r < n ? x[r * l.ldx + k] : 0.0f;
    }
}

// Outputs first ... first + n - 1 of all rows. sums: [tiles][kBlock][kTile]
inline void block(const Linear& l, const float* packed, int64_t first, int n, float* sums) {
    const int64_t tiles = divide_up(l.rows, kTile);
    std::memset(sums, 0, size_t(tiles * kBlock * kTile) * sizeof(float));
    alignas(64) float spare[kOutputs * kTile];
    // as good as equal parts, since each has the next one prefetched
    const int64_t part = divide_up(divide_up(l.inputs, divide_up(l.inputs, kPart)), kLine) * kLine;
    for (int64_t k = 0; k < l.inputs; k += part) {
        const int inputs = int(std::min(part, l.inputs - k));
        const bool last = k + part >= l.inputs, more = !last || first + 2 * kBlock <= l.outputs;
        const int64_t distance = !more ? 0 : last ? kBlock * l.ldw - k : part;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const float* x = packed + (tile * l.inputs + k) * kTile;
            const int rows = int(std::min<int64_t>(kTile, l.rows - tile * kTile));
            float* to = sums + tile * kBlock * kTile;
            const float* w = l.w + first * l.ldw + k;
            int64_t o = 0;
            for (; o + kOutputs <= n; o += kOutputs)
                add(w + o * l.ldw, l.ldw, x, inputs, to + o * kTile, {distance, int(tile), int(tiles)}, rows);
            for (; o < n; ++o) {  // the same row of W for all outputs of a tile
                std::memcpy(spare, to + o * kTile, sizeof(float) * kTile);
                std::memset(spare + kTile, 0, sizeof(float) * (kOutputs - 1) * kTile);
                add(w + o * l.ldw, 0, x, inputs, spare, {0, 0, 0}, rows);
                std::memcpy(to + o * kTile, spare, sizeof(float) * kTile);
            }
        }
    }
    for (int64_t row = 0; row < l.rows; ++row) {
        const float* from = sums + row / kTile * kBlock * kTile + row % kTile;
        float* y = l.y + row * l.ldy + first;
        for (int o = 0; o < n; ++o) y[o] = from[o * kTile];
    }
}

inline bool compute(const Linear& l, int threads) {
    const int64_t tiles = divide_up(l.rows, kTile), blocks = divide_up(l.outputs, kBlock);
    const Floats packed(tiles * l.inputs * kTile);
    if (!packed.data) return false;
    bool complete = true;
#pragma omp parallel num_threads(threads)
    {
        const Floats sums(tiles * kBlock * kTile);
        if (!sums.data) {
#pragma omp atomic write
            complete = false;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t tile = 0; tile < tiles; ++tile) pack(l, tile, packed.data + tile * l.inputs * kTile);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < blocks; ++i)
            if (sums.data)
                block(l, packed.data, i * kBlock, int(std::min<int64_t>(kBlock, l.outputs - i * kBlock)), sums.data);
    }
    return complete;
}
