// NF4 and FP4 on the CPU: blockwise quantize to packed codes and scales, and dequantize to fp32 or bf16.
//
// The layout and the roundings are those of reference.py, bit for bit: scaled = x * (1 / scale) in fp32, the
// code belongs to the level that has as many levels below it as there are thresholds strictly below that value,
// element 2i sits in the high nibble of byte i. The search adds squared errors in the order of reference.py, so
// that both keep the same scale.
//
// Dequantizing a block first scales the 16 table entries (16 products instead of block_size, each rounded as the
// product of one element would be), then only looks values up: on AVX2 eight at a time from two registers, on
// AVX-512 sixteen from one.
//
// Blocks are counted over the flattened tensor, so a row length that is no multiple of the block size is fine.
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

const float* scaled_table(const float* table, float absmax, float* out) {
    for (int i = 0; i < 16; ++i) out[i] = table[i] * absmax;
    return out;
}

template <class T>
struct Quantize {
    const T* x;               // fp32 or bf16
    const float* thresholds;  // [15]
    const uint8_t* order;     // [16], codes by ascending level
    uint8_t* codes;           // [ceil(n / 2)]
    float* scales;            // [ceil(n / block)]
    int64_t n, block;
    float floor;              // a scale nearer to 0 divides as if it were this
};

float reciprocal(float scale, float floor) { return 1.0f / (__builtin_fabsf(scale) < floor ? floor : scale); }

int64_t count_of(int64_t n, int64_t block, int64_t b) { return n - b * block < block ? n - b * block : block; }

// The codes of 64 values at a time and of fewer at the end.
#if defined(__AVX2__)
// Four halvings find how many thresholds lie below eight values; of the candidates of each one, by the outcomes so
// far, a permute picks the right one. `half`, `quarter` and `eighth` are those of the last three.
struct Halving {
    __m256 middle, half, quarter, eighth;
};

Halving halving(const float* t) {
    return {_mm256_set1_ps(t[7]), _mm256_setr_ps(t[3], t[11], 0, 0, 0, 0, 0, 0),
            _mm256_setr_ps(t[1], t[5], t[9], t[13], 0, 0, 0, 0),
            _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14])};
}

__m256i doubled(__m256i found, __m256 threshold, __m256 v) {  // 2 found + (threshold < v)
    const __m256i below = _mm256_castps_si256(_mm256_cmp_ps(threshold, v, _CMP_LT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(found, found), below);
}

__m256i thresholds_below(const Halving& h, __m256 v) {
    __m256i found = doubled(_mm256_setzero_si256(), h.middle, v);
    found = doubled(found, _mm256_permutevar8x32_ps(h.half, found), v);
    found = doubled(found, _mm256_permutevar8x32_ps(h.quarter, found), v);
    return doubled(found, _mm256_permutevar8x32_ps(h.eighth, found), v);
}

// 32 values to 16 bytes.
template <class T>
void encode32(const Halving& h, __m128i order, const T* x, simd::Vec inverse, uint8_t* out) {
    __m256i found[4];
    for (int i = 0; i < 4; ++i) found[i] = thresholds_below(h, (simd::load(x + 8 * i) * inverse).v);
    // the packs take 128-bit lanes from either side: dwords of four values, in the order 0 2 4 6 1 3 5 7
    const __m256i words = _mm256_packus_epi16(_mm256_packus_epi32(found[0], found[1]),
                                              _mm256_packus_epi32(found[2], found[3]));
    const __m256i bytes = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m256i codes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(order), bytes);
    // 16 a + b of every pair of bytes
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
    const __m128i packed = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}
#endif

template <class T>
void encode_block(const Quantize<T>& q, int64_t b) {
    const int64_t start = b * q.block, count = count_of(q.n, q.block, b);
    const float inverse = reciprocal(q.scales[b], q.floor);
    const T* x = q.x + start;
    uint8_t* out = q.codes + start / 2;
    int64_t at = 0;
#if defined(__AVX2__)
    const Halving h = halving(q.thresholds);
    const __m128i order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q.order));
    for (; at + 32 <= count; at += 32) encode32(h, order, x + at, simd::fill(inverse), out + at / 2);
#endif
    int32_t index[64];
    for (; at < count; at += 64) {
        const int64_t step = count - at < 64 ? count - at : 64;
        index[step % 64] = 7;  // the padding of an odd length: 0 lies above 7 thresholds in both tables
        for (int64_t i = 0; i < step; ++i) {
            const float v = simd::widen(x[at + i]) * inverse;
            int32_t below = 0;
#pragma GCC unroll 15  // and the loop over i becomes vectors
            for (int t = 0; t < 15; ++t) below += q.thresholds[t] < v;
            index[i] = below;
        }
        for (int64_t i = 0; i < (step + 1) / 2; ++i)
            out[at / 2 + i] = static_cast<uint8_t>(q.order[index[2 * i]] << 4 | q.order[index[2 * i + 1]]);
    }
}

float absmax_of(const float* x, int64_t count) { return absmax(x, count); }
float absmax_of(const uint16_t* x, int64_t count) {  // the upper halves order like the whole numbers
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = x[i] & 0x7fffu;
        largest = bits > largest ? bits : largest;
    }
    return simd::widen(static_cast<uint16_t>(largest));
}

template <class T>
void encode_blocks(void* data, int64_t first, int64_t last) {
    const Quantize<T>& q = *static_cast<const Quantize<T>*>(data);
    for (int64_t b = first; b < last; ++b) encode_block(q, b);
}

template <class T>
void quantize_blocks(void* data, int64_t first, int64_t last) {
    const Quantize<T>& q = *static_cast<const Quantize<T>*>(data);
    for (int64_t b = first; b < last; ++b) {
        q.scales[b] = absmax_of(q.x + b * q.block, count_of(q.n, q.block, b));
        encode_block(q, b);
    }
}

struct Search {
    const float* x;
    const float* thresholds;  // [15]
    const float* levels;      // [16], ascending
    const float* factors;     // of absmax, to be tried in this order
    const float* inverse;     // 1 / factors
    float* scales;            // [ceil(n / block)]: absmax in, the best scale out
    int64_t count, n, block;
    float floor;
};

constexpr int64_t kLargestBlock = 4096;

// The squared error of x [n], given in units of absmax, with the scale `factor`. The halves of the terms are added
// until one is left; n is a power of two.
float squared_error(const float* thresholds, const float* levels, const float* __restrict x, float factor,
                    float inverse, int64_t n, float* __restrict terms) {
    for (int64_t i = 0; i < n; ++i) {
        const float v = x[i] * inverse;
        float level = levels[0];
#pragma GCC unroll 15  // and the loop over i becomes vectors
        for (int t = 0; t < 15; ++t) {
            const float next = levels[t + 1];
            level = thresholds[t] < v ? next : level;
        }
        const float off = level * factor - x[i];
        terms[i] = off * off;
    }
    for (int64_t half = n / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) terms[i] += terms[i + half];
    return terms[0];
}

void search_blocks(void* data, int64_t first, int64_t last) {
    const Search& s = *static_cast<const Search*>(data);
    float x[kLargestBlock], terms[kLargestBlock], thresholds[15], levels[16];
    std::memcpy(thresholds, s.thresholds, sizeof thresholds);
    std::memcpy(levels, s.levels, sizeof levels);
    for (int64_t b = first; b < last; ++b) {
        const int64_t count = count_of(s.n, s.block, b);
        const float scale = s.scales[b], inverse = reciprocal(scale, s.floor);
        for (int64_t i = 0; i < count; ++i) x[i] = s.x[b * s.block + i] * inverse;
        for (int64_t i = count; i < s.block; ++i) x[i] = 0.0f;
        float best = s.factors[0];
        float least = squared_error(thresholds, levels, x, best, s.inverse[0], s.block, terms);
        for (int64_t f = 1; f < s.count; ++f) {
            const float factor = s.factors[f];
            const float error = squared_error(thresholds, levels, x, factor, s.inverse[f], s.block, terms);
            if (error < least) least = error, best = factor;
        }
        s.scales[b] = scale * best;
    }
}

struct Dequantize {
    const uint8_t* codes;
    const float* table;   // [16]
    const float* absmax;  // [ceil(n / block)]
    void* out;            // [n], fp32 or bf16
    int64_t n, block;
};

void store(float value, float* out) { *out = value; }
void store(float value, uint16_t* out) { *out = bf16_from_float(value); }

#if defined(__AVX2__)
__m256 look_up(__m256 low, __m256 high, __m256i index) {  // table[index], index in 0..15
    const __m256 a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 -> sign
}

void store16(__m256 a, __m256 b, float* out) {
    _mm256_storeu_ps(out, a);
    _mm256_storeu_ps(out + 8, b);
}

__m256i round_to_bf16(__m256 value) {  // eight fp32 -> eight bf16 in the low halves of 32-bit lanes, ties to even
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

void store16(__m256 a, __m256 b, uint16_t* out) {
    const __m256i packed = _mm256_packus_epi32(round_to_bf16(a), round_to_bf16(b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xd8));
}
#endif

#if defined(__AVX512F__)
// Values 2i from `even`, 2i + 1 from `odd`, in turn.
void store32(__m512 even, __m512 odd, float* out) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd));
}

__m512i upper_bf16(__m512 value) {  // rounded to bf16, ties to even, in the upper halves of 32-bit lanes
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

void store32(__m512 even, __m512 odd, uint16_t* out) {  // a lane is a pair of values, the even one below
    const __m512i low = _mm512_srli_epi32(upper_bf16(even), 16);
    _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xaaaaaaaa, low, upper_bf16(odd)));
}
#endif

template <class T>
void dequantize_blocks(void* data, int64_t first, int64_t last) {
    const Dequantize& d = *static_cast<const Dequantize*>(data);
    float scaled[16];
    for (int64_t b = first; b < last; ++b) {
        const int64_t start = b * d.block;
        const int64_t count = d.n - start < d.block ? d.n - start : d.block;
        const uint8_t* codes = d.codes + start / 2;
        T* out = static_cast<T*>(d.out) + start;
        scaled_table(d.table, d.absmax[b], scaled);
        int64_t i = 0;
#if defined(__AVX512F__)
        const __m512 scaled16 = _mm512_loadu_ps(scaled);
        for (; i + 32 <= count; i += 32) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2));
            const __m512i wide = _mm512_cvtepu8_epi32(bytes);  // of an index vpermps reads the lowest four bits
            store32(_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), scaled16),
                    _mm512_permutexvar_ps(wide, scaled16), out + i);
        }
#endif
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
        for (; i < count; ++i) {
            const uint8_t byte = codes[i / 2];
            store(scaled[i % 2 ? byte & 15 : byte >> 4], out + i);
        }
    }
}

int64_t blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }
int64_t grain(int64_t block) { return 32768 / block; }  // blocks: below this a second thread costs more than it saves

}  // namespace

extern "C" {

#define LK_QUANTIZE(op, suffix, T, blocks_of)                                                                       \
    void LK_EXPORT(op##_##suffix)(const T* x, const float* thresholds, const uint8_t* order, uint8_t* codes,       \
                                  float* scales, int64_t n, int64_t block, float floor) {                          \
        Quantize<T> q{x, thresholds, order, codes, scales, n, block, floor};                                       \
        lk_parallel_for(blocks(n, block), grain(block), blocks_of<T>, &q);                                         \
    }
LK_QUANTIZE(nf4_quantize, fp32, float, quantize_blocks)
LK_QUANTIZE(nf4_quantize, bf16, uint16_t, quantize_blocks)
LK_QUANTIZE(nf4_encode, fp32, float, encode_blocks)
LK_QUANTIZE(nf4_encode, bf16, uint16_t, encode_blocks)

void LK_EXPORT(nf4_search)(const float* x, const float* thresholds, const float* levels, const float* factors,
                           const float* inverse, float* scales, int64_t count, int64_t n, int64_t block,
                           float floor) {
    Search s{x, thresholds, levels, factors, inverse, scales, count, n, block, floor};
    lk_parallel_for(blocks(n, block), 4096 / block, search_blocks, &s);
}

void LK_EXPORT(nf4_dequantize_fp32)(const uint8_t* codes, const float* table, const float* absmax, void* out,
                                    int64_t n, int64_t block) {
    Dequantize d{codes, table, absmax, out, n, block};
    lk_parallel_for(blocks(n, block), grain(block), dequantize_blocks<float>, &d);
}

void LK_EXPORT(nf4_dequantize_bf16)(const uint8_t* codes, const float* table, const float* absmax, void* out,
                                    int64_t n, int64_t block) {
    Dequantize d{codes, table, absmax, out, n, block};
    lk_parallel_for(blocks(n, block), grain(block), dequantize_blocks<uint16_t>, &d);
}

}  // extern "C"
