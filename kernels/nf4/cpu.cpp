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

struct Quantize {
    const float* x;
    const float* thresholds;  // [15]
    const uint8_t* order;     // [16], codes by ascending level
    uint8_t* codes;           // [ceil(n / 2)]
    float* scales;            // [ceil(n / block)]
    int64_t n, block;
    float floor;              // a scale nearer to 0 divides as if it were this
};

float reciprocal(float scale, float floor) { return 1.0f / (__builtin_fabsf(scale) < floor ? floor : scale); }

int64_t count_of(int64_t n, int64_t block, int64_t b) { return n - b * block < block ? n - b * block : block; }

void encode_block(const Quantize& q, int64_t b) {
    int32_t index[64];
    const int64_t start = b * q.block, count = count_of(q.n, q.block, b);
    const float inverse = reciprocal(q.scales[b], q.floor);
    for (int64_t at = 0; at < count; at += 64) {
        const int64_t step = count - at < 64 ? count - at : 64;
        const float* x = q.x + start + at;
        index[step % 64] = 7;  // the padding of an odd length: 0 lies above 7 thresholds in both tables
        for (int64_t i = 0; i < step; ++i) {
            const float v = x[i] * inverse;
            int32_t below = 0;
#pragma GCC unroll 15  // and the loop over i becomes vectors
            for (int t = 0; t < 15; ++t) below += q.thresholds[t] < v;
            index[i] = below;
        }
        uint8_t* out = q.codes + (start + at) / 2;
        for (int64_t i = 0; i < (step + 1) / 2; ++i)
            out[i] = static_cast<uint8_t>(q.order[index[2 * i]] << 4 | q.order[index[2 * i + 1]]);
    }
}

void encode_blocks(void* data, int64_t first, int64_t last) {
    const Quantize& q = *static_cast<const Quantize*>(data);
    for (int64_t b = first; b < last; ++b) encode_block(q, b);
}

void quantize_blocks(void* data, int64_t first, int64_t last) {
    const Quantize& q = *static_cast<const Quantize*>(data);
    for (int64_t b = first; b < last; ++b) {
        q.scales[b] = absmax(q.x + b * q.block, count_of(q.n, q.block, b));
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

void LK_EXPORT(nf4_quantize)(const float* x, const float* thresholds, const uint8_t* order, uint8_t* codes,
                             float* absmax, int64_t n, int64_t block, float floor) {
    Quantize q{x, thresholds, order, codes, absmax, n, block, floor};
    lk_parallel_for(blocks(n, block), grain(block), quantize_blocks, &q);
}

void LK_EXPORT(nf4_encode)(const float* x, const float* thresholds, const uint8_t* order, uint8_t* codes,
                           float* scales, int64_t n, int64_t block, float floor) {
    Quantize q{x, thresholds, order, codes, scales, n, block, floor};
    lk_parallel_for(blocks(n, block), grain(block), encode_blocks, &q);
}

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
