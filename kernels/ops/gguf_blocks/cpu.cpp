// GGUF's blocks on the CPU: quantize fp32 or bf16 to the nine formats of __init__.py, byte for byte as fits.py does.
//
// Every lane of a vector has a sub-block of its own (a block, where a type has none): its values are loaded transposed,
// and the search runs as it would for one, with selections in place of branches. So each lane adds its values in their
// order, which is what makes the bytes equal, and a processor works on 8 or 16 sub-blocks at a time. A search does not
// keep its codes but what they are made of, the best inverse scale, and makes them at its end.
//
// The vectors are those of the compiler (GCC's vector extensions), which any instruction set has in some form.
#include <cmath>

#include "simd.h"

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));

struct Quantize {
    const void* x;            // [rows, columns], fp32 or bf16
    const float* importance;  // [columns], or null
    uint8_t* out;             // [rows, bytes]
    int64_t rows, columns, type;
};

enum Type { Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, Q4_K, Q5_K, Q6_K };  // the order of BLOCK_LAYOUTS

constexpr float kNothing = 1e-15f;  // a block whose values are all smaller holds zeros

// ---- arithmetic ----------------------------------------------------------------------------------------------------

inline V fill(float a) { return V{} + a; }
inline V smaller(V a, V b) { return a < b ? a : b; }
inline V larger(V a, V b) { return a > b ? a : b; }
inline V magnitude(V a) { return (V)((I)a & 0x7fffffff); }
inline V root(V a) {
    float v[W];
    std::memcpy(v, &a, sizeof v);
    for (int l = 0; l < W; ++l) v[l] = __builtin_sqrtf(v[l]);
    std::memcpy(&a, v, sizeof v);
    return a;
}
// The nearest integer, ties to even; |a| < 2^22.
inline V rounded(V a) {
    const V magic = fill(12582912.0f);
    return (a + magic) - magic;
}
inline V code(V a, float low, float high) { return rounded(smaller(fill(high), larger(a, fill(low)))); }  // NaN: low

// The nearest integer, none beyond 2^22; 0 for NaN.
inline int nearest(float a) {
    const float limit = 4194304.0f;
    if (!(std::fabs(a) < limit)) return a > 0 ? 1 << 22 : a < 0 ? -(1 << 22) : 0;
    return static_cast<int>((a + 12582912.0f) - 12582912.0f);
}

inline uint16_t half_of(float a) {  // ties to even
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    uint32_t h;
    if (size > 0x7f800000) {
        h = 0x7e00;
    } else if (size >= 0x47800000) {  // 2^16
        h = 0x7c00;
    } else if (size < 0x38800000) {  // 2^-14: a multiple of 2^-24, which the last bit of 0.5 + |a| stands for
        const float shifted = std::fabs(a) + 0.5f;
        std::memcpy(&h, &shifted, 4);
        h -= 0x3f000000;
    } else {
        h = (size + 0xfff + (size >> 13 & 1)) >> 13;
        h -= 112 << 10;
    }
    return static_cast<uint16_t>(sign | h);
}
inline float float_of(uint16_t h) {
    const uint32_t exponent = h >> 10 & 31, rest = h & 0x3ff;
    float a;
    if (exponent == 0) {
        a = static_cast<float>(rest) * 0x1p-24f;
    } else {
        const uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13;
        std::memcpy(&a, &bits, 4);
    }
    return h >> 15 ? -a : a;
}
inline uint8_t* put_half(float a, uint8_t* out) {
    const uint16_t h = half_of(a);
    std::memcpy(out, &h, 2);
    return out + 2;
}

// ---- searches: of W sub-blocks of N values -------------------------------------------------------------------------

struct Extremes {
    V low, high;  // of equals, such as 0 and -0, the first
};
template <int N>
Extremes extremes(const V* x) {
    Extremes e{x[0], x[0]};
    for (int i = 1; i < N; ++i) {
        e.low = smaller(x[i], e.low);
        e.high = larger(x[i], e.high);
    }
    return e;
}
template <int N>
V signed_extreme(const V* x) {  // the first value of the largest magnitude; 0 is +0
    V best = fill(0), most = best;
    for (int i = 0; i < N; ++i) {
        const V size = magnitude(x[i]);
        best = size > most ? x[i] : best;
        most = larger(size, most);
    }
    return best;
}

// x ~ scale q - low for the codes q = over (x - from), rounded and between 0 and top.
struct Affine {
    V scale, low, over, from;
};
template <int N>
V affine_error(const V* x, const V* w, const V* q, V scale, V lowest) {
    V error = fill(0);
    for (int i = 0; i < N; ++i) {
        const V off = (scale * q[i] + lowest) - x[i];
        error += w[i] * (off * off);
    }
    return error;
}
template <int N>
Affine fit_affine(const V* x, const V* w, float top, float first, float step, int last) {
    const V zero = fill(0);
    const Extremes e = extremes<N>(x);
    V lowest = e.low > zero ? zero : e.low, sum_w = zero, sum_x = zero, q[N];
    for (int i = 0; i < N; ++i) {
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    V over = fill(top) / (e.high - lowest);
    Affine fit{fill(1) / over, lowest, over < fill(INFINITY) ? over : zero, lowest};
    for (int i = 0; i < N; ++i) q[i] = code(fit.over * (x[i] - lowest), 0, top);
    V least = affine_error<N>(x, w, q, fit.scale, lowest);
    for (int k = 0; k <= last; ++k) {
        over = fill((first + step * static_cast<float>(k)) + top) / (e.high - lowest);
        V sum_q = zero, sum_qq = zero, sum_xq = zero;
        for (int i = 0; i < N; ++i) {
            q[i] = code(over * (x[i] - lowest), 0, top);
            const V wq = w[i] * q[i];
            sum_q += wq;
            sum_qq += wq * q[i];
            sum_xq += wq * x[i];
        }
        const V determinant = sum_w * sum_qq - sum_q * sum_q;
        V scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
        V moved = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
        scale = moved > zero ? sum_xq / sum_qq : scale;
        moved = moved > zero ? zero : moved;
        const V error = affine_error<N>(x, w, q, scale, moved);
        const I better = (determinant > zero) & (error < least);
        least = better ? error : least;
        fit.scale = better ? scale : fit.scale;
        fit.over = better ? over : fit.over;
        fit.from = better ? lowest : fit.from;
        lowest = better ? moved : lowest;
    }
    fit.low = -lowest;
    return fit;
}

// x ~ scale q for the codes q = over x, rounded and between -half and half - 1.
struct Scaled {
    V scale, over;
};
template <int N>
Scaled fit_symmetric(const V* x, const V* w, float half) {
    const V zero = fill(0), extreme = signed_extreme<N>(x);
    Scaled fit{zero, zero};
    V most = zero;
    for (int k = 0; k < 19; ++k) {
        const int step = k == 0 ? 0 : k < 10 ? k - 10 : k - 9;  // 0, -9..-1, 1..9
        const V over = fill(-(half + 0.1f * static_cast<float>(step))) / extreme;
        V sum_xq = zero, sum_qq = zero;
        for (int i = 0; i < N; ++i) {
            const V q = code(over * x[i], -half, half - 1);
            sum_xq += (w[i] * x[i]) * q;
            sum_qq += (w[i] * q) * q;
        }
        const I better = k == 0 ? zero == zero : (sum_qq > zero) & (sum_xq * sum_xq > most * sum_qq);
        const V scale = k == 0 ? (sum_qq != zero ? sum_xq / sum_qq : zero) : sum_xq / sum_qq;
        fit.scale = better ? scale : fit.scale;
        fit.over = better ? over : fit.over;
        most = better ? scale * sum_xq : most;
    }
    fit.scale = magnitude(extreme) < fill(kNothing) ? zero : fit.scale;
    return fit;
}

// Codes of a fit, from 0; those of a block of nothing are 0.
template <int N>
void symmetric_codes(const V* x, const Scaled& fit, float half, V* q) {
    const I nothing = magnitude(signed_extreme<N>(x)) < fill(kNothing);
    for (int i = 0; i < N; ++i) q[i] = nothing ? fill(0) : code(fit.over * x[i], -half, half - 1) + half;
}

constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The code of the level that is nearest to a, of two the higher; or the level itself.
inline V level_code(V a, bool level) {
    V found = fill(level ? kLevels[0] : 0);
    for (int k = 1; k < 16; ++k)
        found = a < fill((kLevels[k - 1] + kLevels[k]) / 2) ? found : fill(level ? kLevels[k] : static_cast<float>(k));
    return found;
}
template <int N>
V fit_levels(const V* x, const V* w) {
    const V zero = fill(0), extreme = signed_extreme<N>(x);
    V scale = zero, most = zero;
    for (int k = -8; k < 8; ++k) {  // -8 stands for the first guess
        const V over = k == -8 ? fill(1) / (-extreme / kLevels[0]) : fill(kLevels[0] + static_cast<float>(k)) / extreme;
        V sum_xl = zero, sum_ll = zero;
        for (int i = 0; i < N; ++i) {
            const V level = level_code(over * x[i], true), wl = w[i] * level;
            sum_xl += wl * x[i];
            sum_ll += wl * level;
        }
        I better = sum_ll > zero;
        if (k > -8) better &= sum_xl * sum_xl > most * sum_ll;
        scale = better ? sum_xl / sum_ll : scale;
        most = better ? scale * sum_xl : most;
    }
    return magnitude(extreme) < fill(kNothing) ? zero : scale;
}

// x >= 0 ~ scale q for eight values, with q from 0 to 63; returns scale.
float fit_positive(const float* x, const float* w, uint8_t* codes) {
    const int top = 63;
    const auto code_of = [](float a) { return static_cast<float>(nearest(a) < top ? nearest(a) : top); };
    float highest = 0;
    for (int i = 0; i < 8; ++i) highest = x[i] > highest ? x[i] : highest;
    std::memset(codes, 0, 8);
    if (highest < kNothing) return 0;
    float best = 0, least = 0, q[8];
    for (int k = 0; k < 9; ++k) {
        const int step = k == 0 ? 0 : k < 5 ? k - 5 : k - 4;  // 0, -4..-1, 1..4
        const float over = (0.1f * static_cast<float>(step) + static_cast<float>(top)) / highest, scale = 1 / over;
        float error = 0;
        for (int i = 0; i < 8; ++i) {
            const float off = x[i] - scale * (k == 0 ? static_cast<float>(nearest(over * x[i])) : code_of(over * x[i]));
            error += w[i] * off * off;
        }
        if (k == 0 || error < least) best = over, least = error;
    }
    float sum_xq = 0, sum_qq = 0;
    for (int i = 0; i < 8; ++i) {
        q[i] = code_of(best * x[i]);
        sum_xq += w[i] * x[i] * q[i];
        sum_qq += w[i] * q[i] * q[i];
    }
    bool changed = true;
    for (int round = 0; round < 5 && changed; ++round) {
        changed = false;
        for (int i = 0; i < 8; ++i) {
            const float others_xq = sum_xq - w[i] * x[i] * q[i], others_qq = sum_qq - w[i] * q[i] * q[i];
            if (!(others_xq > 0 && others_qq > 0)) continue;
            const float found = code_of(x[i] * others_qq / others_xq);
            const float xq = others_xq + w[i] * x[i] * found, qq = others_qq + w[i] * found * found;
            if (found == q[i] || !(xq * xq * sum_qq > sum_xq * sum_xq * qq)) continue;
            q[i] = found, sum_xq = xq, sum_qq = qq, changed = true;
        }
    }
    for (int i = 0; i < 8; ++i) codes[i] = static_cast<uint8_t>(static_cast<int>(q[i]));  // below 0: wraps around
    return sum_qq > 0 ? sum_xq / sum_qq : 0;
}

// ---- values and weights --------------------------------------------------------------------------------------------

template <int N>
void transpose(const float (&rows)[W][N], V* columns) {
    float turned[N][W];
    for (int l = 0; l < W; ++l)
        for (int i = 0; i < N; ++i) turned[i][l] = rows[l][i];
    std::memcpy(columns, turned, sizeof turned);
}

// The values of sub-blocks from `first` on, `count` of them; the other lanes hold 0.
template <int N, class T>
void load(const T* x, int64_t first, int count, V* v) {
    float rows[W][N] = {};
    for (int l = 0; l < count; ++l)
        for (int i = 0; i < N; ++i) rows[l][i] = simd::widen(x[(first + l) * N + i]);
    transpose<N>(rows, v);
}
template <int N>
void load_importance(const Quantize& p, int64_t first, int count, V* v) {
    float rows[W][N] = {};
    for (int l = 0; l < count; ++l) std::memcpy(rows[l], p.importance + (first + l) * N % p.columns, sizeof rows[l]);
    transpose<N>(rows, v);
}

// The sum of squares of `length` values that begin at a multiple of it, for each lane's sub-block.
template <int N, class T>
V squares(const T* x, int64_t first, int count, int64_t length) {
    float sums[W] = {};
    for (int l = 0; l < count; ++l) {
        const int64_t from = (first + l) * N / length * length;
        if (l > 0 && from == (first + l - 1) * N / length * length) {
            sums[l] = sums[l - 1];
            continue;
        }
        for (int64_t i = 0; i < length; ++i) {
            const float a = simd::widen(x[from + i]);
            sums[l] += a * a;
        }
    }
    V v;
    std::memcpy(&v, sums, sizeof sums);
    return v;
}

// importance sqrt(mean + x^2)
template <int N>
void weigh(const Quantize& p, int64_t first, int count, const V* x, V mean, V* w) {
    load_importance<N>(p, first, count, w);
    for (int i = 0; i < N; ++i) w[i] = w[i] * root(mean + x[i] * x[i]);
}

// The codes of lane l, one after the other.
template <int N>
void store(const V* q, uint8_t (*codes)[N]) {
    float rows[N][W];
    std::memcpy(rows, q, sizeof rows);
    for (int l = 0; l < W; ++l)
        for (int i = 0; i < N; ++i) codes[l][i] = static_cast<uint8_t>(static_cast<int>(rows[i][l]));
}

inline void put_nibbles(const uint8_t* q, int n, uint8_t* out) {
    for (int i = 0; i < n; ++i) out[i] = static_cast<uint8_t>((q[i] & 15) | (q[n + i] & 15) << 4);
}

// ---- formats -------------------------------------------------------------------------------------------------------

// Blocks of 32 values: W of them at most.
template <class T, int TYPE>
void blocks32(const Quantize& p, int64_t first, int count, uint8_t* out) {
    constexpr bool five = TYPE == Q5_0 || TYPE == Q5_1, affine = TYPE == Q4_1 || TYPE == Q5_1;
    constexpr float top = five ? 31 : 15, half = (top + 1) / 2;
    const T* values = static_cast<const T*>(p.x);
    const V zero = fill(0);
    V x[32], w[32], q[32], d, m = zero;
    load<32>(values, first, count, x);
    if (TYPE == IQ4_NL) {
        if (p.importance) {
            weigh<32>(p, first, count, x, squares<32>(values, first, count, 32) * (2.0f / 32), w);
        } else {
            for (int i = 0; i < 32; ++i) w[i] = x[i] * x[i];
        }
        d = fit_levels<32>(x, w);
        const V over = d != zero ? 1 / d : zero;
        for (int i = 0; i < 32; ++i) q[i] = level_code(over * x[i], false);
    } else if (p.importance) {
        const V mean = squares<32>(values, first, count, p.columns) / static_cast<float>(p.columns);
        weigh<32>(p, first, count, x, mean, w);
        if (affine) {
            const Affine fit = fit_affine<32>(x, w, top, -0.9f, 0.05f, 36);
            d = fit.scale, m = -fit.low;
            for (int i = 0; i < 32; ++i) q[i] = code(fit.over * (x[i] - fit.from), 0, top);
        } else {
            const Scaled fit = fit_symmetric<32>(x, w, half);
            d = fit.scale;
            symmetric_codes<32>(x, fit, half, q);
        }
    } else {
        const Extremes e = extremes<32>(x);
        d = affine ? (e.high - e.low) / top : signed_extreme<32>(x) / -half;
        m = e.low;
        V over = d != zero ? 1 / d : zero;
        over = magnitude(over) < fill(INFINITY) ? over : zero;
        const I lost = (d != zero) & (over == zero);  // no code but 0 comes of what overflows
        for (int i = 0; i < 32; ++i) {
            const V a = affine ? (x[i] - m) * over + 0.5f : x[i] * over + (half + 0.5f);
            const V whole = rounded(a);
            q[i] = lost ? zero : smaller(whole > a ? whole - 1 : whole, fill(top));
        }
    }
    uint8_t codes[W][32];
    store<32>(q, codes);
    for (int l = 0; l < count; ++l) {
        out = put_half(d[l], out);
        if (affine) out = put_half(m[l], out);
        for (int k = 0; five && k < 4; ++k, ++out) {
            *out = 0;
            for (int i = 0; i < 8; ++i) *out = static_cast<uint8_t>(*out | codes[l][8 * k + i] >> 4 << i);
        }
        put_nibbles(codes[l], 16, out);
        out += 16;
    }
}

template <class T>
void blocks_q8_0(const Quantize& p, int64_t first, int count, uint8_t* out) {
    const T* x = static_cast<const T*>(p.x) + first * 32;
    for (int l = 0; l < count; ++l, x += 32, out += 32) {
        float v[32];
        for (int i = 0; i < 32; ++i) v[i] = simd::widen(x[i]);
        const float d = absmax(v, 32) / 127;
        const float over = d != 0 ? 1 / d : 0;
        out = put_half(d, out);
        for (int i = 0; i < 32; ++i) {  // halves away from zero; 128 and more only where `over` is infinite
            const float a = v[i] * over, size = std::fabs(a) < 128 ? std::fabs(a) : 0;
            const int whole = static_cast<int>(size), near = whole + (size - static_cast<float>(whole) >= 0.5f);
            out[i] = static_cast<uint8_t>(a < 0 ? -near : near);
        }
    }
}

// A step, a 63rd of the largest of eight, and each of them in steps.
float by_the_largest(const float* v, uint8_t* steps) {
    float largest = 0;
    for (int j = 0; j < 8; ++j) largest = v[j] > largest ? v[j] : largest;
    const float over = largest > 0 ? 63 / largest : 0;
    for (int j = 0; j < 8; ++j) {
        const uint8_t step = static_cast<uint8_t>(nearest(over * v[j]));
        steps[j] = step < 63 ? step : 63;
    }
    return largest / 63;
}

// Super-blocks of eight sub-blocks: W / 8 of them at most.
template <class T, int TYPE>
void blocks_affine_k(const Quantize& p, int64_t first, int count, uint8_t* out) {
    constexpr int top = TYPE == Q4_K ? 15 : 31, nbytes = TYPE == Q4_K ? 144 : 176;
    const T* values = static_cast<const T*>(p.x);
    V x[32], w[32], q[32];
    load<32>(values, first * 8, count * 8, x);
    Affine fit;
    float scale[W], low[W], sums[W], step[W] = {}, base[W] = {};
    if (p.importance) {
        weigh<32>(p, first * 8, count * 8, x, 2.0f * squares<32>(values, first * 8, count * 8, 256) / 256.0f, w);
        fit = fit_affine<32>(x, w, top, -0.9f, 0.05f, 36);
    } else {
        V mean = fill(0);
        for (int i = 0; i < 32; ++i) mean += x[i] * x[i];
        mean = root(mean / 32.0f);
        for (int i = 0; i < 32; ++i) w[i] = mean + magnitude(x[i]);
        fit = TYPE == Q4_K ? fit_affine<32>(x, w, top, -1.0f, 0.1f, 20) : fit_affine<32>(x, w, top, -0.5f, 0.1f, 15);
    }
    V sum_w = fill(0);
    for (int i = 0; i < 32; ++i) sum_w += w[i];
    std::memcpy(scale, &fit.scale, sizeof scale);
    std::memcpy(low, &fit.low, sizeof low);
    std::memcpy(sums, &sum_w, sizeof sums);
    for (int b = 0; b < count; ++b) {
        uint8_t s[8], m[8], *to = out + b * nbytes;
        const int at = 8 * b;
        const float d = p.importance ? fit_positive(scale + at, sums + at, s) : by_the_largest(scale + at, s);
        const float dmin = p.importance ? fit_positive(low + at, sums + at, m) : by_the_largest(low + at, m);
        put_half(dmin, put_half(d, to));
        for (int j = 0; TYPE == Q5_K && j < 8; ++j) {
            s[j] = s[j] < 63 ? s[j] : 63;
            m[j] = m[j] < 63 ? m[j] : 63;
        }
        for (int j = 0; j < 4; ++j) {
            to[4 + j] = static_cast<uint8_t>(s[j] | s[j + 4] >> 4 << 6);
            to[8 + j] = static_cast<uint8_t>(m[j] | m[j + 4] >> 4 << 6);
            to[12 + j] = static_cast<uint8_t>((s[j + 4] & 15) | (m[j + 4] & 15) << 4);
        }
        const float read_d = float_of(half_of(d)), read_dmin = float_of(half_of(dmin));
        for (int j = 0; j < 4; ++j) {  // as they are read: q4_k lets numbers beyond 63 run into others
            step[at + j] = read_d * (to[4 + j] & 63);
            base[at + j] = read_dmin * (to[8 + j] & 63);
            step[at + 4 + j] = read_d * ((to[12 + j] & 15) | to[4 + j] >> 6 << 4);
            base[at + 4 + j] = read_dmin * (to[12 + j] >> 4 | to[8 + j] >> 6 << 4);
        }
    }
    V steps, bases;
    std::memcpy(&steps, step, sizeof step);
    std::memcpy(&bases, base, sizeof base);
    for (int i = 0; i < 32; ++i) {
        const V fitted = code(fit.over * (x[i] - fit.from), 0, top), again = code((x[i] + bases) / steps, 0, top);
        q[i] = steps != fill(0) ? again : fitted;
    }
    uint8_t codes[W][32];
    store<32>(q, codes);
    for (int b = 0; b < count; ++b) {
        uint8_t* to = out + b * nbytes + 16;
        if (TYPE == Q5_K) {
            for (int i = 0; i < 32; ++i) {
                to[i] = 0;
                for (int j = 0; j < 8; ++j) to[i] = static_cast<uint8_t>(to[i] | codes[8 * b + j][i] >> 4 << j);
            }
            to += 32;
        }
        for (int j = 0; j < 8; j += 2) put_nibbles(codes[8 * b + j], 32, to + 16 * j);
    }
}

// A super-block of sixteen sub-blocks.
template <class T>
void block_q6_k(const Quantize& p, int64_t block, uint8_t* out) {
    constexpr int parts = 16 / W;
    const T* values = static_cast<const T*>(p.x);
    V x[parts][16], w[16], q[parts][16];
    float scale[16], extreme = 0;
    for (int part = 0; part < parts; ++part) {
        const int64_t first = block * 16 + part * W;
        load<16>(values, first, W, x[part]);
        if (p.importance) {
            load_importance<16>(p, first, W, w);
        } else {
            for (int i = 0; i < 16; ++i) w[i] = x[part][i] * x[part][i];
        }
        const Scaled fit = fit_symmetric<16>(x[part], w, 32);
        symmetric_codes<16>(x[part], fit, 32, q[part]);
        std::memcpy(scale + part * W, &fit.scale, sizeof fit.scale);
    }
    for (float a : scale) extreme = std::fabs(a) > std::fabs(extreme) ? a : extreme;
    if (std::fabs(extreme) < kNothing) {
        std::memset(out, 0, 210);
        return;
    }
    const float over = -128 / extreme, d = 1 / over;
    put_half(d, out + 208);
    uint8_t codes[16][16];
    for (int part = 0; part < parts; ++part) {
        V step;
        for (int l = 0; l < W; ++l) {
            const int j = part * W + l, found = nearest(over * scale[j]);
            const int8_t s = static_cast<int8_t>(found < 127 ? found : 127);
            out[192 + j] = static_cast<uint8_t>(s);
            step[l] = float_of(half_of(d)) * s;
        }
        for (int i = 0; i < 16; ++i)
            q[part][i] = step != fill(0) ? code(x[part][i] / step, -32, 31) + 32 : q[part][i];
        store<16>(q[part], codes + part * W);
    }
    for (int h = 0; h < 2; ++h) {
        const uint8_t* r = codes[8 * h];
        put_nibbles(r, 64, out + 64 * h);
        for (int i = 0; i < 32; ++i)
            out[128 + 32 * h + i] = static_cast<uint8_t>(r[i] >> 4 | r[32 + i] >> 4 << 2 | r[64 + i] >> 4 << 4 |
                                                         r[96 + i] >> 4 << 6);
    }
}

// Blocks of a few rows, as many at a time as there are lanes for.
template <class T, int TYPE>
void quantize_rows(const Quantize& p) {
    constexpr int values = TYPE < Q4_K ? 32 : 256, group = TYPE < Q4_K ? W : TYPE == Q6_K ? 1 : W / 8;
    constexpr int sizes[] = {34, 18, 20, 22, 24, 18, 144, 176, 210};
    simd::parallel(p.rows, 16 * p.columns, [&](int64_t begin, int64_t end) {
        const int64_t of_row = p.columns / values;
        for (int64_t b = begin * of_row; b < end * of_row; b += group) {
            const int count = static_cast<int>(simd::smaller(group, end * of_row - b));
            uint8_t* out = p.out + b * sizes[TYPE];
            if constexpr (TYPE == Q8_0) blocks_q8_0<T>(p, b, count, out);
            else if constexpr (TYPE < Q4_K) blocks32<T, TYPE>(p, b, count, out);
            else if constexpr (TYPE == Q6_K) block_q6_k<T>(p, b, out);
            else blocks_affine_k<T, TYPE>(p, b, count, out);
        }
    });
}

template <class T>
void quantize(const Quantize& p) {
    switch (p.type) {
        case Q8_0: return quantize_rows<T, Q8_0>(p);
        case Q4_0: return quantize_rows<T, Q4_0>(p);
        case Q4_1: return quantize_rows<T, Q4_1>(p);
        case Q5_0: return quantize_rows<T, Q5_0>(p);
        case Q5_1: return quantize_rows<T, Q5_1>(p);
        case IQ4_NL: return quantize_rows<T, IQ4_NL>(p);
        case Q4_K: return quantize_rows<T, Q4_K>(p);
        case Q5_K: return quantize_rows<T, Q5_K>(p);
        case Q6_K: return quantize_rows<T, Q6_K>(p);
    }
}

}  // namespace

extern "C" {
void LK_EXPORT(gguf_quantize_fp32)(Quantize* p) { quantize<float>(*p); }
void LK_EXPORT(gguf_quantize_bf16)(Quantize* p) { quantize<uint16_t>(*p); }
}  // extern "C"
