// The same product in fp32 multiply-adds, for any vector length. Included once per instruction set, inside a target region
// and a namespace that defines `V`, its vectors of V::W lanes:
//
//   F, I            floats and 32-bit integers
//   load, store, set1, fma, mul, sub, loadi, from_int, shr<n>, shl16, high16, low<mask>, bits, bytes, half, pick, where
//
// Activations are rows of fp32, zero-padded to whole steps. No include guard on purpose.

ALWAYS_F32 void scales_of(const uint16_t* s, int type, float* out) {
    for (int j = 0; j < kPanel; ++j) out[j] = type == kF16 ? half_to_float(s[j]) : bf16_to_float(s[j]);
}

// Lanes LANE .. LANE + W - 1 of the two kept values of quad Q.
template <int BITS, int Q, int LANE>
ALWAYS_F32 void kept(const uint8_t* codes, int type, V::F& a, V::F& b) {
    if constexpr (BITS == 4) {
        const V::I c = V::loadi(codes + Q / 4 * 64 + LANE * 4);
        a = V::sub(V::from_int(V::low<15>(V::shr<4 * (Q % 4)>(c))), V::set1(8.0f));
        b = V::sub(V::from_int(V::low<15>(V::shr<4 * (Q % 4) + 16>(c))), V::set1(8.0f));
    } else if constexpr (BITS == 8) {
        a = V::from_int(V::bytes(codes + Q * 32 + LANE));
        b = V::from_int(V::bytes(codes + Q * 32 + 16 + LANE));
    } else {
        const V::I v = V::loadi(codes + Q * 64 + LANE * 4);
        if (type == kBf16) {
            a = V::bits(V::shl16(v));
            b = V::bits(V::high16(v));
        } else {
            a = V::half(V::low<0xffff>(v));
            b = V::half(V::shr<16>(v));
        }
    }
}

template <int BITS, int R, int Q, int LANE>
ALWAYS_F32 void direct_lanes(const uint8_t* p, int type, const float* x, int64_t ldx, V::F (&sum)[R][kPanel / V::W]) {
    if constexpr (LANE < kPanel) {
        V::F a, b;
        kept<BITS, Q, LANE>(p + kMetaBytes, type, a, b);
        const V::I meta = V::loadi(p + LANE * 4);
        const V::I ia = V::low<3>(V::shr<4 * (Q % 4) + 2 * (Q / 4)>(meta));
        const V::I ib = V::low<3>(V::shr<4 * (Q % 4) + 2 * (Q / 4) + 16>(meta));
        for (int r = 0; r < R; ++r) {
            V::F& s = sum[r][LANE / V::W];
            s = V::fma(a, V::pick(x + r * ldx + 4 * Q, ia), s);
            s = V::fma(b, V::pick(x + r * ldx + 4 * Q, ib), s);
        }
        direct_lanes<BITS, R, Q, LANE + V::W>(p, type, x, ldx, sum);
    }
}

template <int BITS, int R, int Q>
ALWAYS_F32 void direct_quads(const uint8_t* p, int type, const float* x, int64_t ldx, V::F (&sum)[R][kPanel / V::W]) {
    if constexpr (Q < 8) {
        direct_lanes<BITS, R, Q, 0>(p, type, x, ldx, sum);
        direct_quads<BITS, R, Q + 1>(p, type, x, ldx, sum);
    }
}

// out[r * kPair + 0 .. 15] = the outputs of one panel of a 2:4 pair (p: its first step) for R rows.
template <int BITS, int R>
static void direct(const Layout& l, const uint8_t* p, const uint16_t* scales, const float* x, int64_t ldx, float* out) {
    for (int r = 0; r < R; ++r) std::fill(out + r * kPair, out + r * kPair + kPanel, 0.0f);
    for (int64_t g = 0; g < l.groups; ++g) {
        V::F sum[R][kPanel / V::W];
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < kPanel / V::W; ++v) sum[r][v] = V::set1(0.0f);
        }
        for (int64_t s = 0; s < l.steps_per_group; ++s, p += 2 * l.step_bytes, x += kStep) {
            direct_quads<BITS, R, 0>(p, l.stored_type, x, ldx, sum);
        }
        float scale[kPanel];
        if (BITS < 16) scales_of(scales + g * kPair, l.stored_type, scale);
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < kPanel / V::W; ++v) {
                float* to = out + r * kPair + v * V::W;
                const V::F factor = BITS < 16 ? V::load(scale + v * V::W) : V::set1(1.0f);
                V::store(to, V::fma(sum[r][v], factor, V::load(to)));
            }
        }
    }
}

// ------------------------------------------------------------------------------- decode to fp32, zeros in place

template <int BITS, int Q, int LANE>
ALWAYS_F32 void decode_quad(const uint8_t* p, int type, const float* scale, float* out) {
    if constexpr (Q < 8) {
        V::F a, b;
        kept<BITS, Q, LANE>(p + kMetaBytes, type, a, b);
        if (BITS < 16) {
            a = V::mul(a, V::load(scale + LANE));
            b = V::mul(b, V::load(scale + LANE));
        }
        const V::I meta = V::loadi(p + LANE * 4);
        const V::I ia = V::low<3>(V::shr<4 * (Q % 4) + 2 * (Q / 4)>(meta));
        const V::I ib = V::low<3>(V::shr<4 * (Q % 4) + 2 * (Q / 4) + 16>(meta));
        for (int i = 0; i < 4; ++i) {
            V::store(out + (4 * Q + i) * kPanel + LANE, V::where(ia, a, ib, b, i));
        }
        if constexpr (LANE + V::W < kPanel) {
            decode_quad<BITS, Q, LANE + V::W>(p, type, scale, out);
        } else {
            decode_quad<BITS, Q + 1, 0>(p, type, scale, out);
        }
    }
}

template <int BITS, int K, int LANE>
ALWAYS_F32 void decode_input(const uint8_t* p, const float* scale, float* out) {
    if constexpr (K < kStep) {
        V::F w;
        if constexpr (BITS == 4) {
            const V::I c = V::loadi(p + K / 8 * 64 + LANE * 4);
            w = V::sub(V::from_int(V::low<15>(V::shr<4 * (K / 2 % 4) + 16 * (K % 2)>(c))), V::set1(8.0f));
        } else {
            w = V::from_int(V::bytes(p + K * 16 + LANE));
        }
        V::store(out + K * kPanel + LANE, V::mul(w, V::load(scale + LANE)));
        if constexpr (LANE + V::W < kPanel) {
            decode_input<BITS, K, LANE + V::W>(p, scale, out);
        } else {
            decode_input<BITS, K + 1, 0>(p, scale, out);
        }
    }
}

// out[input][16 outputs]. first: the number of the first step, which says what group it belongs to.
template <int BITS, bool SPARSE>
static void decode(const Layout& l, const uint8_t* p, const uint16_t* scales, int64_t first, int steps, float* out) {
    float scale[kPanel];
    for (int s = 0; s < steps; ++s, p += 2 * l.step_bytes, out += kStep * kPanel) {
        if (BITS < 16 && (s == 0 || (first + s) % l.steps_per_group == 0)) {
            scales_of(scales + (first + s) / l.steps_per_group * kPair, l.stored_type, scale);
        }
        if constexpr (SPARSE) {
            decode_quad<BITS, 0, 0>(p, l.stored_type, scale, out);
        } else {
            decode_input<BITS, 0, 0>(p, scale, out);
        }
    }
}

// c[i * kPair + 0 .. 15] += sum_k x[i][k] * b[k][16] for ROWS rows.
template <int ROWS>
static void multiply(const float* x, int64_t ldx, const float* b, int inputs, float* c) {
    V::F sum[ROWS][kPanel / V::W];
    for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < kPanel / V::W; ++v) sum[i][v] = V::set1(0.0f);
    }
    for (int k = 0; k < inputs; ++k) {
        V::F w[kPanel / V::W];
        for (int v = 0; v < kPanel / V::W; ++v) w[v] = V::load(b + k * kPanel + v * V::W);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const V::F xi = V::set1(x[i * ldx + k]);
#pragma GCC unroll 4
            for (int v = 0; v < kPanel / V::W; ++v) sum[i][v] = V::fma(w[v], xi, sum[i][v]);
        }
    }
    for (int i = 0; i < ROWS; ++i) {
        for (int v = 0; v < kPanel / V::W; ++v) {
            float* to = c + i * kPair + v * V::W;
            V::store(to, V::add(V::load(to), sum[i][v]));
        }
    }
}

static F32Kernels kernels(const Layout& l) {
    F32Kernels k{};
    if (l.sparse) {
        if (l.bits < 16) k.decode = l.bits == 4 ? decode<4, true> : decode<8, true>;
        if constexpr (V::kDirectCodes) {
            if (l.bits == 4) k = {decode<4, true>, {direct<4, 1>, direct<4, 2>, direct<4, 3>, direct<4, 4>}, {}};
            if (l.bits == 8) k = {decode<8, true>, {direct<8, 1>, direct<8, 2>, direct<8, 3>, direct<8, 4>}, {}};
        }
        if (l.bits == 16) k = {decode<16, true>, {direct<16, 1>, direct<16, 2>, direct<16, 3>, direct<16, 4>}, {}};
    } else {
        k.decode = l.bits == 4 ? decode<4, false> : decode<8, false>;
    }
    k.multiply[0] = multiply<1>;
    k.multiply[1] = multiply<2>;
    k.multiply[2] = multiply<3>;
    k.multiply[3] = multiply<4>;
    return k;
}
