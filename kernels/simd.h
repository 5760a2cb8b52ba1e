// What every cpu.cpp needs: the exported name of an op, the parallel loop, bf16 rounding, and eight floats at a time.
//
// Each cpu.cpp is compiled once per instruction set (CMakeLists.txt) with LORAKIT_ISA = scalar, avx2, ...
// LK_EXPORT(op) then names lk_scalar_op, lk_avx2_op, ..., and kernels/dispatch.py picks by lk_best_isa().
// Everything else in a cpu.cpp lives in an anonymous namespace: an inline function that is shared between two
// copies could be linked in its AVX2 form into the scalar one, and die on an old machine.
//
// Namespace simd holds Vec, eight floats, and what is made of them. Kernels are written once in its terms: the
// scalar form does the same to an array, in the same order, and differs in the fused multiply-add alone.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LK_JOIN_(a, b, c, d) a##b##c##d
#define LK_JOIN(a, b, c, d) LK_JOIN_(a, b, c, d)
#define LK_EXPORT(op) __attribute__((visibility("default"))) LK_JOIN(lk_, LORAKIT_ISA, _, op)

// Runs body(context, first, last) over [0, n) in contiguous pieces of at least `grain`, on torch's OpenMP pool.
extern "C" void lk_parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

namespace {

// fp32 -> bf16, round to nearest even. Finite input only.
inline uint16_t bf16_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
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

// ---- eight floats --------------------------------------------------------------------------------------------------
//
// bf16 is stored with ties to even. Infinity stays infinity, and NaN NaN, but for one whose lower half is all ones;
// no arithmetic makes that.

#if defined(__AVX2__)
struct Vec {
    __m256 v;
};
inline Vec fill(float a) { return {_mm256_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline __m256i bf16_bits(Vec a) {  // in the upper halves; the lower ones are not zero
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
// As a value of type T would be read back.
template <class T>
inline Vec rounded(Vec a) {
    if (sizeof(T) == 4) return a;
    return {_mm256_castsi256_ps(_mm256_and_si256(bf16_bits(a), _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec madd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }              // b where one is NaN
inline Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }             // likewise
inline Vec magnitude(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec by_sign(Vec a, Vec negative, Vec positive) { return {_mm256_blendv_ps(positive.v, negative.v, a.v)}; }
inline Vec power_of_two(Vec a) {  // the lowest eight bits of a are the exponent of the result
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
#else
struct Vec {
    float v[8];
};
template <class F>
inline Vec lanes(F f) {
    Vec r;
    for (int i = 0; i < 8; ++i) r.v[i] = f(i);
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
    for (int i = 0; i < 8; ++i) p[i] = bf16_from_float(a.v[i]);
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
inline Vec magnitude(Vec a) {
    return lanes([&](int i) { return __builtin_fabsf(a.v[i]); });
}
inline Vec by_sign(Vec a, Vec negative, Vec positive) {
    return lanes([&](int i) { return bits_of(a.v[i]) >> 31 ? negative.v[i] : positive.v[i]; });
}
inline Vec power_of_two(Vec a) {
    return lanes([&](int i) { return float_of(bits_of(a.v[i]) << 23); });
}
#endif

inline Vec operator-(Vec a) { return fill(-0.0f) - a; }

inline float sum(Vec a) {
    float v[8];
    store(a, v);
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

inline float largest(Vec a) {
    float v[8];
    store(a, v);
    float found = v[0];
    for (int i = 1; i < 8; ++i) found = v[i] > found ? v[i] : found;
    return found;
}

// ---- loops over rows of any length ---------------------------------------------------------------------------------

// Which of a vector's lanes lie inside the row: all, or the first few. No access goes beyond them.
struct All {};
struct First {
    int64_t count;
};

template <class T>
inline Vec load(const T* p, All) { return load(p); }
template <class T>
inline Vec load(const T* p, First part) {  // then zeros
    T padded[8] = {};
    std::memcpy(padded, p, static_cast<size_t>(part.count) * sizeof(T));
    return load(padded);
}
template <class T>
inline Vec load(const T* p, All, float) { return load(p); }
template <class T>
inline Vec load(const T* p, First part, float otherwise) {  // then that
    float padded[8];
    for (int i = 0; i < 8; ++i) padded[i] = i < part.count ? widen(p[i]) : otherwise;
    return load(padded);
}
inline Vec only(Vec a, All) { return a; }
inline Vec only(Vec a, First part) {  // then zeros
    float v[8];
    store(a, v);
    return load(v, part);
}
template <class T>
inline void store(Vec a, T* p, All) { store(a, p); }
template <class T>
inline void store(Vec a, T* p, First part) {
    T padded[8];
    store(a, padded);
    std::memcpy(p, padded, static_cast<size_t>(part.count) * sizeof(T));
}

// f(i, part) for every vector that begins at i in [0, n).
template <class F>
inline void vectors(int64_t n, F f) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) f(i, All{});
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
    for (; i + 32 <= n; i += 32)
        for (int u = 0; u < 4; ++u) r.v[u] = f(i + 8 * u, All{}, r.v[u]);
    for (int u = 0; i < n; ++u, i += 8)
        r.v[u] = n - i < 8 ? f(i, First{n - i}, r.v[u]) : f(i, All{}, r.v[u]);
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

// |tanh| = (1 - e) / (1 + e) for e = e^(-2|x|), both sums rounded once; near 0 nothing cancels. To 2 ulp.
inline Vec tanh(Vec x) {
    const Exponential e = exponential_parts(fill(-2.0f) * magnitude(x));
    const Vec one = fill(1.0f);
    const Vec y = madd(e.power, e.rest, e.power - one) / madd(e.power, e.rest, e.power + one);
    return by_sign(x, y, -y);
}

}  // namespace simd

}  // namespace
