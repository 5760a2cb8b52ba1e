// A matrix in 4 bits as the kernels read it: its scales, and the look-up of 32 values at a time.
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

inline void make_table(__m512 levels, float scale, Table16& out) {
    out.v = _mm512_castps_si512(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
}
inline void make_table(__m512 levels, float scale, Table32& out) {
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(levels, _mm512_set1_ps(scale)));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i upper = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));  // ties to even
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

}  // namespace
