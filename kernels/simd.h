// What every cpu.cpp needs: the exported name of an op, the parallel loop, bf16 rounding, and a vector of floats.
//
// Each cpu.cpp is compiled once per instruction set (CMakeLists.txt) with LORAKIT_ISA = scalar, avx2, ...
// LK_EXPORT(op) then names lk_scalar_op, lk_avx2_op, ..., and kernels/dispatch.py picks from lk_runnable().
// Everything else in a cpu.cpp lives in an anonymous namespace: an inline function that is shared between two
// copies could be linked in its AVX2 form into the scalar one, and die on an old machine.
//
// Namespace simd holds Vec and what is made of it. Vec is eight floats. A kernel that counts on no number of them
// defines LORAKIT_ANY_LANES before it includes this file, and gets as many as a register holds: LANES is 16 for
// AVX-512 and 4 for NEON. Kernels are written once in its terms: the scalar form does the same to an array, and differs
// in the fused multiply-add alone; LANES changes the order of sums, and no value that is computed on its own.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(LORAKIT_NEON)
#include <arm_neon.h>
#endif

#define LK_JOIN_(a, b, c, d) a##b##c##d
#define LK_JOIN(a, b, c, d) LK_JOIN_(a, b, c, d)
#define LK_EXPORT(op) __attribute__((visibility("default"))) LK_JOIN(lk_, LORAKIT_ISA, _, op)

// Runs body(context, first, last) over [0, n) in pieces of `grain` and more; which thread does which is left open.
extern "C" void lk_parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);
// Runs body(context, first, last) once in every thread of a team, all at the same time: each has a share of [0, n).
extern "C" void lk_team(int64_t n, void (*body)(void*, int64_t, int64_t), void* context);

namespace {

// fp32 -> bf16, round to nearest even. Finite input only.
inline uint16_t bf16_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The largest bit pattern of |x|. Integers order like floats here, and NaN comes out on top.
inline float absmax(const float* x, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    float result;
    std::memcpy(&result, &largest, 4);
    return result;
}

namespace simd {

constexpr int64_t GRAIN = 32768;  // values: below this a second thread costs more than it saves

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// f(first, last) in parallel over pieces of [0, n), of which one holds `values` values.
template <class F>
inline void parallel(int64_t n, int64_t values, F f) {
    const int64_t grain = values < GRAIN ? GRAIN / (values > 0 ? values : 1) : 1;
    lk_parallel_for(n, grain, [](void* body, int64_t first, int64_t last) { (*static_cast<F*>(body))(first, last); },
                    &f);
}

inline float widen(float a) { return a; }
inline float widen(uint16_t a) {
    const uint32_t bits = static_cast<uint32_t>(a) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// ---- a vector of floats --------------------------------------------------------------------------------------------
//
// bf16 is stored with ties to even. Infinity stays infinity, and NaN NaN, but for one whose lower half is all ones;
// no arithmetic makes that. AVX512-BF16's own conversion would turn subnormal numbers into 0.

// Which of a vector's lanes lie inside a row: all, or the first few. No access goes beyond them.
struct All {};
struct First {
    int64_t count;
};

#if defined(LORAKIT_ANY_LANES) && defined(__AVX512F__)
constexpr int LANES = 16;
struct Vec {
    __m512 v;
};
inline __mmask16 mask(First part) { return static_cast<__mmask16>((1u << part.count) - 1); }
inline Vec widened(__m256i bits) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))}; }
inline __m512i bf16_bits(Vec a) {  // in the upper halves; the lower ones are not zero
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline __m256i narrowed(Vec a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(a), 16)); }
inline Vec fill(float a) { return {_mm512_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const uint16_t* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(Vec a, float* p) { _mm512_storeu_ps(p, a.v); }
inline void store(Vec a, uint16_t* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(a)); }
// A last part: the lanes beyond it are loaded as 0 and stored nowhere; `only` sets them.
inline Vec load(const float* p, First part) { return {_mm512_maskz_loadu_ps(mask(part), p)}; }
inline Vec load(const uint16_t* p, First part) { return widened(_mm256_maskz_loadu_epi16(mask(part), p)); }
inline void store(Vec a, float* p, First part) { _mm512_mask_storeu_ps(p, mask(part), a.v); }
inline void store(Vec a, uint16_t* p, First part) { _mm256_mask_storeu_epi16(p, mask(part), narrowed(a)); }
inline Vec only(Vec a, First part, float otherwise) {
    return {_mm512_mask_blend_ps(mask(part), _mm512_set1_ps(otherwise), a.v)};
}
// The values as they would be read back from type T.
template <class T>
inline Vec rounded(Vec a) {
    if (sizeof(T) == 4) return a;
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_and_si512(bf16_bits(a), upper))};
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec madd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }              // b where one is NaN
inline Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }             // likewise
inline Vec square_root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec magnitude(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec by_sign(Vec a, Vec negative, Vec positive) {
    return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(a.v)), positive.v, negative.v)};
}
inline Vec power_of_two(Vec a) {  // the lowest eight bits of a are the exponent of the result
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
#elif defined(__AVX2__)
constexpr int LANES = 8;
struct Vec {
    __m256 v;
};
inline Vec fill(float a) { return {_mm256_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline __m256i bf16_bits(Vec a) {
    const __m256i bits = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline void store(Vec a, float* p) { _mm256_storeu_ps(p, a.v); }
inline void store(Vec a, uint16_t* p) {
    const __m256i bits = _mm256_srli_epi32(bf16_bits(a), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
template <class T>
inline Vec rounded(Vec a) {
    if (sizeof(T) == 4) return a;
    return {_mm256_castsi256_ps(_mm256_and_si256(bf16_bits(a), _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec madd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec square_root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec magnitude(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec by_sign(Vec a, Vec negative, Vec positive) { return {_mm256_blendv_ps(positive.v, negative.v, a.v)}; }
inline Vec power_of_two(Vec a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
inline float sum(Vec a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Vec a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#elif defined(LORAKIT_ANY_LANES) && defined(LORAKIT_NEON)
constexpr int LANES = 4;
struct Vec {
    float32x4_t v;
};
inline Vec fill(float a) { return {vdupq_n_f32(a)}; }
inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline Vec load(const uint16_t* p) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))}; }
inline uint32x4_t bf16_bits(Vec a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
}
inline void store(Vec a, float* p) { vst1q_f32(p, a.v); }
inline void store(Vec a, uint16_t* p) { vst1_u16(p, vshrn_n_u32(bf16_bits(a), 16)); }
template <class T>
inline Vec rounded(Vec a) {
    if (sizeof(T) == 4) return a;
    return {vreinterpretq_f32_u32(vandq_u32(bf16_bits(a), vdupq_n_u32(0xffff0000u)))};
}
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec madd(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec larger(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }   // vmaxq takes the NaN
inline Vec smaller(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }  // likewise
inline Vec square_root(Vec a) { return {vsqrtq_f32(a.v)}; }
inline Vec magnitude(Vec a) { return {vabsq_f32(a.v)}; }
inline Vec by_sign(Vec a, Vec negative, Vec positive) {
    return {vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(a.v)), negative.v, positive.v)};
}
inline Vec power_of_two(Vec a) { return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a.v), 23))}; }
inline float sum(Vec a) { return vaddvq_f32(a.v); }
inline float largest(Vec a) { return vmaxvq_f32(a.v); }
#else
constexpr int LANES = 8;
struct Vec {
    float v[LANES];
};
template <class F>
inline Vec lanes(F f) {
    Vec r;
    for (int i = 0; i < LANES; ++i) r.v[i] = f(i);
    return r;
}
inline uint32_t bits_of(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float a;
    std::memcpy(&a, &bits, 4);
    return a;
}
inline Vec fill(float a) {
    return lanes([&](int) { return a; });
}
template <class T>
inline Vec load(const T* p) {
    return lanes([&](int i) { return widen(p[i]); });
}
inline void store(Vec a, float* p) { std::memcpy(p, a.v, sizeof a.v); }
inline void store(Vec a, uint16_t* p) {
    for (int i = 0; i < LANES; ++i) p[i] = bf16_from_float(a.v[i]);
}
template <class T>
inline Vec rounded(Vec a) {
    if (sizeof(T) == 4) return a;
    return lanes([&](int i) { return widen(bf16_from_float(a.v[i])); });
}
inline Vec operator+(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec madd(Vec a, Vec b, Vec c) {
    return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec larger(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec smaller(Vec a, Vec b) {
    return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec square_root(Vec a) {
    return lanes([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
inline Vec magnitude(Vec a) {
    return lanes([&](int i) { return __builtin_fabsf(a.v[i]); });
}
inline Vec by_sign(Vec a, Vec negative, Vec positive) {
    return lanes([&](int i) { return bits_of(a.v[i]) >> 31 ? negative.v[i] : positive.v[i]; });
}
inline Vec power_of_two(Vec a) {
    return lanes([&](int i) { return float_of(bits_of(a.v[i]) << 23); });
}
inline float sum(Vec a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
inline float largest(Vec a) {
    float found = a.v[0];
    for (int i = 1; i < LANES; ++i) found = a.v[i] > found ? a.v[i] : found;
    return found;
}
#endif

inline Vec operator-(Vec a) { return fill(-0.0f) - a; }

// LANES vectors as the rows of a matrix become its columns.
#if defined(LORAKIT_ANY_LANES) && defined(__AVX512F__)
inline void transpose(Vec (&a)[LANES]) {
    __m512 pairs[16], fours[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(a[i].v, a[i + 1].v);
        pairs[i + 1] = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    }
    for (int i = 0; i < 4; ++i) {  // the quarters of each of the fours belong to columns i, i + 4, i + 8 and i + 12
        const __m512 even_top = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0x88);
        const __m512 even_rest = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0x88);
        const __m512 odd_top = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0xdd);
        const __m512 odd_rest = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0xdd);
        a[i].v = _mm512_shuffle_f32x4(even_top, even_rest, 0x88);
        a[i + 4].v = _mm512_shuffle_f32x4(odd_top, odd_rest, 0x88);
        a[i + 8].v = _mm512_shuffle_f32x4(even_top, even_rest, 0xdd);
        a[i + 12].v = _mm512_shuffle_f32x4(odd_top, odd_rest, 0xdd);
    }
}
#elif defined(__AVX2__)
inline void transpose(Vec (&a)[LANES]) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(a[i].v, a[i + 1].v);
        pairs[i + 1] = _mm256_unpackhi_ps(a[i].v, a[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    }
    for (int i = 0; i < 4; ++i) {
        a[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        a[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
}
#else
inline void transpose(Vec (&a)[LANES]) {
    for (int i = 0; i < LANES; ++i) {
        for (int j = 0; j < i; ++j) {
            const float other = a[i].v[j];
            a[i].v[j] = a[j].v[i];
            a[j].v[i] = other;
        }
    }
}
#endif

// ---- loops over rows of any length ---------------------------------------------------------------------------------

#if !(defined(LORAKIT_ANY_LANES) && defined(__AVX512F__))  // which has masks
template <class T>
inline Vec load(const T* p, First part) {
    T padded[LANES] = {};
    std::memcpy(padded, p, static_cast<size_t>(part.count) * sizeof(T));
    return load(padded);
}
template <class T>
inline void store(Vec a, T* p, First part) {
    T padded[LANES];
    store(a, padded);
    std::memcpy(p, padded, static_cast<size_t>(part.count) * sizeof(T));
}
inline Vec only(Vec a, First part, float otherwise) {
    float v[LANES];
    store(a, v);
    for (int64_t i = part.count; i < LANES; ++i) v[i] = otherwise;
    return load(v);
}
#endif
template <class T>
inline Vec load(const T* p, All) { return load(p); }
template <class T>
inline void store(Vec a, T* p, All) { store(a, p); }
inline Vec only(Vec a, All, float) { return a; }

// f(i, part) for every vector that begins at i in [0, n).
template <class F>
inline void vectors(int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, All{});
    if (i < n) f(i, First{n - i});
}

// Four running values that start as `start` and become f(i, part, value) in turn: one would wait for itself.
struct Running {
    Vec v[4];
};
template <class F>
inline Running running(int64_t n, Vec start, F f) {
    Running r = {{start, start, start, start}};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int u = 0; u < 4; ++u) r.v[u] = f(i + LANES * u, All{}, r.v[u]);
    for (int u = 0; i < n; ++u, i += LANES)
        r.v[u] = n - i < LANES ? f(i, First{n - i}, r.v[u]) : f(i, All{}, r.v[u]);
    return r;
}
inline float sum(Running r) { return sum((r.v[0] + r.v[1]) + (r.v[2] + r.v[3])); }
inline float largest(Running r) { return largest(larger(larger(r.v[0], r.v[1]), larger(r.v[2], r.v[3]))); }

// ---- functions -----------------------------------------------------------------------------------------------------

template <int N>
inline Vec polynomial(const float (&c)[N], Vec x) {  // c[0] + c[1] x + ...
    Vec p = fill(c[N - 1]);
    for (int k = N - 2; k >= 0; --k) p = madd(p, x, fill(c[k]));
    return p;
}

// e^x = power (1 + rest): power is 2^n for the integer n next to x / ln 2, and rest e^r - 1 for the remainder r,
// |r| <= ln(2) / 2, by a polynomial (minimax, 1.4e-8 of the value). x at most 88; below -88 power is 0.
struct Exponential {
    Vec power, rest;
};
inline Exponential exponential_parts(Vec x) {
    const float coefficients[] = {0.5f, 0.16666543f, 0.04166628f, 0.0083666109f, 0.0013946497f};
    const Vec shift = fill(12582912.0f + 127.0f);  // 1.5 * 2^23: the sum's last bits are n + 127
    const Vec a = larger(fill(-88.0f), x);
    const Vec shifted = madd(a, fill(1.44269504f), shift);
    const Vec n = shifted - shift;
    // ln 2 in two parts, the first short enough that n times it is exact
    const Vec r = madd(n, fill(2.12194440e-4f), madd(n, fill(-0.693359375f), a));
    return {power_of_two(shifted), madd(r * r, polynomial(coefficients, r), r)};
}

// To 1.1 ulp for x <= 88, and 0 where it is below the smallest normal number. NaN stays NaN.
inline Vec exponential(Vec x) {
    const Exponential e = exponential_parts(x);
    return madd(e.power, e.rest, e.power);
}

// 2^x = 2^n 2^r for the integer n next to x and the remainder r, exact, |r| <= 1/2, 2^r by a polynomial (minimax, 1.6e-8
// of the value): to 1.1 ulp for x <= 127, and 0 below -126.5. NaN stays NaN. Where x comes out of a product, e^y =
// 2^(LOG2E y) costs no more and spares the reduction by ln 2; but what rounds LOG2E y counts 0.7 |x| times.
constexpr float LOG2E = 1.44269504f;
inline Vec exponential2(Vec x) {
    const float coefficients[] = {1.0f, 0.693147182f, 0.240226462f, 0.0555032864f, 0.00961848907f, 0.00133999309f,
                                  0.000153458124f};
    const Vec shift = fill(12582912.0f + 127.0f);  // as above
    const Vec a = larger(fill(-127.0f), x);
    const Vec shifted = a + shift;
    return power_of_two(shifted) * polynomial(coefficients, a - (shifted - shift));
}

// |tanh| = (1 - e) / (1 + e) for e = e^(-2|x|), both sums rounded once; near 0 nothing cancels. To 2 ulp.
inline Vec tanh(Vec x) {
    const Exponential e = exponential_parts(fill(-2.0f) * magnitude(x));
    const Vec one = fill(1.0f);
    const Vec y = madd(e.power, e.rest, e.power - one) / madd(e.power, e.rest, e.power + one);
    return by_sign(x, y, -y);
}

}  // namespace simd

}  // namespace
