// NF4 on the CPU: blockwise quantize to packed codes and absmax, and dequantize to fp32 or bf16.
//
// The layout and the roundings are those of reference.py, bit for bit: scaled = x * (1 / absmax) in fp32, the
// code is the number of thresholds strictly below it, element 2i sits in the high nibble of byte i.
// Dequantizing a block first scales the 16 table entries (16 products instead of block_size, each rounded as the
// product of one element would be), then only looks values up: on AVX2, eight at a time from two registers.
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

// absmax of one block: the largest bit pattern of |x|. Integers order like floats here, and NaN comes out on top.
float block_absmax(const float* x, int64_t count) {
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

struct Quantize {
    const float* x;
    const float* thresholds;  // [15]
    uint8_t* codes;           // [ceil(n / 2)]
    float* absmax;            // [ceil(n / block)]
    int64_t n, block;
    float floor;              // absmax below this divides as if it were this
};

void quantize_blocks(void* data, int64_t first, int64_t last) {
    const Quantize& q = *static_cast<const Quantize*>(data);
    uint8_t nibble[64];
    for (int64_t b = first; b < last; ++b) {
        const int64_t start = b * q.block;
        const int64_t count = q.n - start < q.block ? q.n - start : q.block;
        const float amax = block_absmax(q.x + start, count);
        q.absmax[b] = amax;
        const float inverse = 1.0f / (amax < q.floor ? q.floor : amax);
        for (int64_t at = 0; at < count; at += 64) {
            const int64_t step = count - at < 64 ? count - at : 64;
            const float* x = q.x + start + at;
            std::memset(nibble, 0, sizeof nibble);
            for (int64_t i = 0; i < step; ++i) {
                const float v = x[i] * inverse;
                uint8_t code = 0;
                for (int t = 0; t < 15; ++t) code += q.thresholds[t] < v;
                nibble[i] = code;
            }
            if (step % 2) nibble[step] = 7;  // the padding nibble of an odd length is the code of 0
            uint8_t* out = q.codes + (start + at) / 2;
            for (int64_t i = 0; i < (step + 1) / 2; ++i)
                out[i] = static_cast<uint8_t>(nibble[2 * i] << 4 | nibble[2 * i + 1]);
        }
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

void LK_EXPORT(nf4_quantize)(const float* x, const float* thresholds, uint8_t* codes, float* absmax, int64_t n,
                             int64_t block, float floor) {
    Quantize q{x, thresholds, codes, absmax, n, block, floor};
    lk_parallel_for(blocks(n, block), grain(block), quantize_blocks, &q);
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
