// A matrix in 4 bits as the kernels read it: its scales, the look-up of 32 values at a time, and blocks made dense.
#pragma once
#include "simd.h"

namespace {

constexpr int64_t GROUP = 256;  // scales that share one of their own

struct PackedNF4 {
    const uint8_t* codes;  // [ceil(n / 2)]
    const void* absmax;    // [ceil(n / block)], uint8 with double quantization, else fp32
    const float* nested;   // [ceil(blocks / GROUP)], or null
    const float* offset;   // []
    const float* map;      // [256]
    const float* table;    // [16]
    int64_t block;
    float largest;         // that a scale of double quantization may be
};

inline float double_quantized(const PackedNF4& w, uint8_t code, float nested, float offset) {
    const float scale = w.map[code] * nested + offset;
    return scale > w.largest ? w.largest : scale;
}

inline float scale_of(const PackedNF4& w, int64_t block) {
    if (!w.nested) return static_cast<const float*>(w.absmax)[block];
    return double_quantized(w, static_cast<const uint8_t*>(w.absmax)[block], w.nested[block / GROUP], *w.offset);
}

#if defined(__AVX512F__)
// A table of 16 values, from which 16 bytes of codes look up 32. Each byte is spread over two lanes and shifted there,
// so that the lowest bits of an index, all that a permutation reads, are its higher code in the even lane and its lower
// one in the odd.
struct Table16 {
    __m512i v;
};
struct Table32 {  // every value twice: the lowest bit of an index is any
    __m512i v;
};

inline __m512i rounded_to_bf16(__m512i bits) {  // ties to even; in the upper halves, of 32 bits each
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline void make_table(__m512 levels, float scale, Table16& out) {
    out.v = _mm512_castps_si512(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
}
inline void make_table(__m512 levels, float scale, Table32& out) {
    const __m512i upper = rounded_to_bf16(_mm512_castps_si512(_mm512_mul_ps(levels, _mm512_set1_ps(scale))));
    out.v = _mm512_mask_blend_epi16(0x55555555, upper, _mm512_srli_epi32(upper, 16));
}

inline __m512i spread(const uint8_t* codes, __m512i where) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))), where);
}

inline __m512i looked_up32(const Table32& table, const uint8_t* codes) {
    // two lanes of 16 bits to a byte, which goes to the lower half of the even one and the upper half of the odd
    const __m512i byte = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i where = _mm512_add_epi32(_mm512_mullo_epi32(byte, _mm512_set1_epi32(0x01000001)),
                                           _mm512_set1_epi32(0x00808000));
    const __m512i index = _mm512_srlv_epi16(spread(codes, where), _mm512_set1_epi32(0x00070003));
    return _mm512_permutexvar_epi16(index, table.v);
}
#endif

// The 16 levels of a block, rounded to what type R holds.
template <class R>
inline void make_levels(const float* table, float scale, float* out) {
    for (int i = 0; i < 16; ++i) {
        const float level = table[i] * scale;
        out[i] = sizeof(R) == 4 ? level : simd::widen(bf16_from_float(level));
    }
}

inline void store(float value, float* out) { *out = value; }
inline void store(float value, uint16_t* out) { *out = bf16_from_float(value); }

#if defined(__AVX2__)
inline __m256 look_up(__m256 low, __m256 high, __m256i index) {  // table[index], index in 0..15
    const __m256 a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 -> sign
}

inline void store16(__m256 a, __m256 b, float* out) {
    _mm256_storeu_ps(out, a);
    _mm256_storeu_ps(out + 8, b);
}

inline __m256i round_to_bf16(__m256 value) {  // eight fp32 -> eight bf16 in the low halves of 32-bit lanes, ties to even
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

inline void store16(__m256 a, __m256 b, uint16_t* out) {
    const __m256i packed = _mm256_packus_epi32(round_to_bf16(a), round_to_bf16(b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xd8));
}
#endif

#if defined(__AVX512F__)
inline void look_up32(const Table16& table, const uint8_t* codes, float* out) {
    // two lanes of 32 bits to a byte; 0x80 gives a zero
    const __m512i where = _mm512_add_epi32(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                                           _mm512_set1_epi32(static_cast<int>(0x80808000u)));
    const __m512i shift = _mm512_set1_epi64(4);
    for (int i = 0; i < 2; ++i) {
        const __m512i bytes = spread(codes, _mm512_add_epi32(where, _mm512_set1_epi32(8 * i)));
        const __m512i found = _mm512_permutexvar_epi32(_mm512_srlv_epi32(bytes, shift), table.v);
        _mm512_storeu_si512(out + 16 * i, found);
    }
}

inline void look_up32(const Table32& table, const uint8_t* codes, uint16_t* out) {
    _mm512_storeu_si512(out, looked_up32(table, codes));
}

template <class T>
struct TableOf {
    using Type = Table16;
};
template <>
struct TableOf<uint16_t> {
    using Type = Table32;
};
#endif

// It starts with the value i of a block.
template <class T, class R>
__attribute__((noinline)) void dequantize_rest(const float* table, const uint8_t* codes, float scale, int64_t i,
                                               int64_t count, T* out) {
    float scaled[16];
    make_levels<R>(table, scale, scaled);
#if defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(scaled), high = _mm256_loadu_ps(scaled + 8);
    const __m256i mask = _mm256_set1_epi32(15);
    for (; i + 16 <= count; i += 16) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2));
        const __m256i wide = _mm256_cvtepu8_epi32(bytes);
        const __m256 even = look_up(low, high, _mm256_srli_epi32(wide, 4));
        const __m256 odd = look_up(low, high, _mm256_and_si256(wide, mask));
        const __m256 x = _mm256_unpacklo_ps(even, odd), y = _mm256_unpackhi_ps(even, odd);
        store16(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31), out + i);
    }
#endif
    for (int64_t left = count - i; left > 0; --left, ++i) {
        const uint8_t byte = codes[i / 2];
        store(scaled[i % 2 ? byte & 15 : byte >> 4], out + i);
    }
}

// Makes blocks dense, as T, each level rounded to R first. Holds copies of what it reads, which no store can change, so
// that they stay in registers.
template <class T, class R = float>
struct Decoder {
    const uint8_t* codes;
    const float* table;
    int64_t block;
#if defined(__AVX512F__)
    __m512 levels;
    explicit Decoder(const PackedNF4& w)
        : codes(w.codes), table(w.table), block(w.block), levels(_mm512_loadu_ps(w.table)) {}
#else
    explicit Decoder(const PackedNF4& w) : codes(w.codes), table(w.table), block(w.block) {}
#endif
    // block b to out [count]
    __attribute__((always_inline)) void operator()(int64_t b, float scale, int64_t count, T* out) const {
        from(codes + b * block / 2, scale, count, out);
    }
    // values of one block, whose codes begin at `at`, to out [count]
    __attribute__((always_inline)) void from(const uint8_t* at, float scale, int64_t count, T* out) const {
        int64_t i = 0;
#if defined(__AVX512F__)
        typename TableOf<T>::Type scaled;
        make_table(levels, scale, scaled);
        if (sizeof(R) == 2) scaled.v = _mm512_and_si512(rounded_to_bf16(scaled.v), _mm512_set1_epi32(-65536));
        for (; i + 32 <= count; i += 32) look_up32(scaled, at + i / 2, out + i);
        if (i == count) return;
#endif
        dequantize_rest<T, R>(table, at, scale, i, count, out);
    }
};

}  // namespace
