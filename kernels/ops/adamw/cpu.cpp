// AdamW on the CPU: all tensors in one call, every value read and written once.
//
// The work is a list of pieces of tensors; a piece is one thread's. With fp32 state the products and sums are torch's:
// the second of m <- b1 m + (1 - b1) g and of its like is rounded together with the sum, where the processor can.
//
// 8-bit state: a block of 256 is dequantized, updated in fp32 and quantized again while it lies in the nearest cache.
// Every product and sum is rounded on its own there, so that the state is bit for bit that of reference.py.
//
// The code of x is the number of edges below it. The edges lie next to seven lines of which the smallest is taken, as
// derived in triton.py, and one comparison with the exact edge decides: two look-ups a value and moment, no search.
#define LORAKIT_ANY_LANES
#include "simd.h"

namespace {

using namespace simd;

constexpr int64_t BLOCK = 256;  // values of an absmax; as in state.py

struct Step {
    // A row for each tensor: the addresses of p, g, m, v and the length; with 8-bit state those of p, g, the codes and
    // absmax of m, the codes and absmax of v, and the length.
    const int64_t* tensors;
    const int64_t* pieces;                                      // [count, 2]: a row of tensors, which piece of it
    const float *m_levels, *m_edges, *v_levels, *v_edges;       // [256], with 8-bit state
    int64_t count, size;                                        // of the pieces; values in one
    float decay, beta1, rest1, beta2, rest2, rate, correction, eps, floor;
};

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

// f(row of the tensor, first value, number of values) for every piece
template <int WIDTH, class F>
void for_pieces(const Step& a, F f) {
    parallel(a.count, a.size, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t* row = a.tensors + a.pieces[2 * i] * WIDTH;
            const int64_t start = a.pieces[2 * i + 1] * a.size;
            f(row, start, smaller(a.size, row[WIDTH - 1] - start));
        }
    });
}

// p after its step, by the new m and v
inline Vec updated(const Step& a, Vec p, Vec m, Vec v) {
    return p * fill(a.decay) - fill(a.rate) * m / (square_root(v) * fill(a.correction) + fill(a.eps));
}

void step(const Step& a) {
    for_pieces<5>(a, [&](const int64_t* row, int64_t start, int64_t n) {
        float *p = pointer<float>(row[0]) + start, *m = pointer<float>(row[2]) + start;
        float* v = pointer<float>(row[3]) + start;
        const float* g = pointer<float>(row[1]) + start;
        vectors(n, [&](int64_t i, auto part) {
            const Vec grad = load(g + i, part);
            const Vec mean = madd(grad, fill(a.rest1), load(m + i, part) * fill(a.beta1));
            const Vec square = madd(fill(a.rest2) * grad, grad, load(v + i, part) * fill(a.beta2));
            store(updated(a, load(p + i, part), mean, square), p + i, part);
            store(mean, m + i, part);
            store(square, v + i, part);
        });
    });
}

// ---- 8-bit state ---------------------------------------------------------------------------------------------------

// The place of x among the edges, or that of an edge next to it, before it is rounded down.
template <bool SIGNED>
inline Vec place(Vec x) {
    constexpr float middle = SIGNED ? 128 : 1;  // the number of the first edge of the lowest decade
    const Vec size = magnitude(x);
    Vec edge = fill(255.5f - middle);  // beyond it lies nothing but NaN
    double parts = SIGNED ? 1 : 2, power = 1e6;
    const double lowest = parts;
    for (int decade = 0; decade < 7; ++decade, parts *= 2, power /= 10) {
        const Vec slope = fill(static_cast<float>(parts * power / 0.9));
        edge = smaller(madd(size, slope, fill(static_cast<float>(parts * 8 / 9 - lowest + 0.5))), edge);
    }
    return fill(middle) + (SIGNED ? by_sign(smaller(x, fill(0)), -edge, edge) : edge);  // NaN is not below 0
}

#if defined(__AVX512F__)
// table[index] for a table of N floats: of 32, in two registers, a permutation picks by the lower five bits of the index;
// of the picks from two halves the next bit chooses. A gather takes longer.
template <int N>
inline __m512 pick(const float* table, __m512i index) {
    if constexpr (N == 32) {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
    } else {
        const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(N / 2));
        return _mm512_mask_blend_ps(upper, pick<N / 2>(table, index), pick<N / 2>(table + N / 2, index));
    }
}
inline Vec look_up(const float* table, const uint8_t* index) {
    return {pick<256>(table, _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index))))};
}
template <bool SIGNED>
inline void store_codes(Vec x, const float* edges, uint8_t* out) {
    const __m512i edge = _mm512_cvttps_epi32(place<SIGNED>(x).v);
    const __mmask16 below = _mm512_cmp_ps_mask(x.v, pick<256>(edges, edge), _CMP_LE_OQ);
    const __m512i code = _mm512_mask_sub_epi32(edge, below, edge, _mm512_set1_epi32(1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(code));
}
#elif defined(__AVX2__)
inline __m256i wide(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Vec look_up(const float* table, const uint8_t* index) { return {_mm256_i32gather_ps(table, wide(index), 4)}; }
template <bool SIGNED>
inline void store_codes(Vec x, const float* edges, uint8_t* out) {
    const __m256i edge = _mm256_cvttps_epi32(place<SIGNED>(x).v);
    const __m256 below = _mm256_cmp_ps(x.v, _mm256_i32gather_ps(edges, edge, 4), _CMP_LE_OQ);
    const __m256i code = _mm256_add_epi32(edge, _mm256_castps_si256(below));  // -1 where it is not above
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
}
#else
inline Vec look_up(const float* table, const uint8_t* index) {
    float found[LANES];
    for (int i = 0; i < LANES; ++i) found[i] = table[index[i]];
    return load(found);
}
template <bool SIGNED>
inline void store_codes(Vec x, const float* edges, uint8_t* out) {
    float value[LANES], edge[LANES];
    store(x, value);
    store(place<SIGNED>(x), edge);
    for (int i = 0; i < LANES; ++i) {
        const int at = static_cast<int>(edge[i]);
        out[i] = static_cast<uint8_t>(at - (value[i] <= edges[at]));
    }
}
#endif

// The codes of x [BLOCK], by the scale of the first n
template <bool SIGNED>
float quantize(const float* x, int64_t n, const float* edges, float floor, uint8_t* codes) {
    const float scale = absmax(x, n);
    const Vec over = fill(1 / (scale < floor ? floor : scale));
    for (int64_t i = 0; i < BLOCK; i += LANES) store_codes<SIGNED>(load(x + i) * over, edges, codes + i);
    return scale;
}

struct Block {
    float* p;
    const float* g;
    uint8_t *m, *v;  // codes
    float *m_absmax, *v_absmax;
};

// Whole blocks of n = BLOCK values; of a last one only n count, but all are there.
void update(const Step& a, const Block& b, int64_t n) {
    float mean[BLOCK], square[BLOCK];
    const Vec m_scale = fill(*b.m_absmax), v_scale = fill(*b.v_absmax);
    for (int64_t i = 0; i < BLOCK; i += LANES) {
        const Vec g = load(b.g + i);
        const Vec m = look_up(a.m_levels, b.m + i) * m_scale * fill(a.beta1) + g * fill(a.rest1);
        const Vec v = look_up(a.v_levels, b.v + i) * v_scale * fill(a.beta2) + g * g * fill(a.rest2);
        store(updated(a, load(b.p + i), m, v), b.p + i);
        store(m, mean + i);
        store(v, square + i);
    }
    *b.m_absmax = quantize<true>(mean, n, a.m_edges, a.floor, b.m);
    *b.v_absmax = quantize<false>(square, n, a.v_edges, a.floor, b.v);
}

void update_last(const Step& a, const Block& b, int64_t n) {
    float p[BLOCK] = {}, g[BLOCK] = {};
    uint8_t m[BLOCK] = {}, v[BLOCK] = {};
    const size_t bytes = static_cast<size_t>(n);
    std::memcpy(p, b.p, bytes * sizeof(float));
    std::memcpy(g, b.g, bytes * sizeof(float));
    std::memcpy(m, b.m, bytes);
    std::memcpy(v, b.v, bytes);
    update(a, {p, g, m, v, b.m_absmax, b.v_absmax}, n);
    std::memcpy(b.p, p, bytes * sizeof(float));
    std::memcpy(b.m, m, bytes);
    std::memcpy(b.v, v, bytes);
}

void step_8bit(const Step& a) {
    for_pieces<7>(a, [&](const int64_t* row, int64_t start, int64_t n) {
        for (int64_t i = 0; i < n; i += BLOCK) {
            const int64_t at = start + i, block = at / BLOCK;
            const Block b = {pointer<float>(row[0]) + at,        pointer<float>(row[1]) + at,
                             pointer<uint8_t>(row[2]) + at,      pointer<uint8_t>(row[4]) + at,
                             pointer<float>(row[3]) + block,     pointer<float>(row[5]) + block};
            n - i < BLOCK ? update_last(a, b, n - i) : update(a, b, BLOCK);
        }
    });
}

}  // namespace

extern "C" {

void LK_EXPORT(adamw)(const Step* a) { step(*a); }
void LK_EXPORT(adamw_8bit)(const Step* a) { step_8bit(*a); }

}  // extern "C"
