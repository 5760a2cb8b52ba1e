// Rows of a matrix times a few rows of activations: the products of the decoding step.
//
// The matrix is dense, or packed in int8 or in 4 bits, and is multiplied as it is stored: no copy of it is made. All
// sums are in fp32. A packed row is summed in pieces of 32 or 64 values, each of which starts from zero, so that many
// additions run at the same time; a piece's sum of unscaled levels is multiplied by the scale of its block.
//
// The order of a sum depends on the row's length and kind alone. N rows at a time give the bits of one at a time.
#pragma once
#include "ops/nf4/packed.h"
#include "simd.h"

namespace {

using namespace simd;

// Eight whole numbers of a byte, or the first of them, the rest 0.
#if defined(__AVX2__)
inline Vec load(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
#else
inline Vec load(const int8_t* p) {
    return lanes([&](int i) { return static_cast<float>(p[i]); });
}
#endif
inline Vec load(const int8_t* p, First part) {
    int8_t padded[8] = {};
    std::memcpy(padded, p, static_cast<size_t>(part.count));
    return load(padded);
}
using simd::load;

// A matrix in 4 bits or in 8, with one scale a row; null codes and values: it is dense
struct PackedWeight {
    PackedNF4 nf4;
    const int8_t* values;
    const float* scale;
};

// ---- rows of a matrix, 64 values at a time -------------------------------------------------------------------------
//
// Such a row has `values`, which finds half h of the 64 values from k on; `added`, which adds the sum of 32 products to
// a total; and `rest`, the values from k on that do not make 64, 8 at a time. Rows that may end with HALF of 64 values
// have no rest.

// A dense row, or whole numbers without their scale
template <class W>
struct Row {
    static constexpr int64_t BYTES = 64 * sizeof(W);  // of 64 values
    static constexpr bool HALF = false;
    const W* w;
    template <bool WHOLE>
    void values(int64_t k, int h, Vec (&out)[4]) const {
        for (int j = 0; j < 4; ++j) out[j] = load(w + k + 32 * h + 8 * j);
    }
    Vec scale(int64_t, int) const { return fill(0); }
    static Vec added(Vec part, Vec, Vec total) { return total + part; }
    Vec rest(int64_t k, int64_t count) const { return count >= 8 ? load(w + k) : load(w + k, First{count}); }
};

// 64 values of R rows times N rows of x, added to the totals.
template <bool WHOLE, int R, int N, class Rows>
inline __attribute__((always_inline)) void add_64(const Rows (&rows)[R], int64_t k, const float* x, int64_t x_stride,
                                                  Vec (&total)[R][N]) {
    for (int h = 0; h < 2; ++h) {
        Vec v[R][4], scale[R];
        for (int r = 0; r < R; ++r) {
            rows[r].template values<WHOLE>(k, h, v[r]);
            scale[r] = rows[r].scale(k, h);
        }
        const float* at = x + k + 32 * h;
        for (int n = 0; n < N; ++n, at += x_stride) {
            Vec part[R];
            for (int r = 0; r < R; ++r) part[r] = v[r][0] * load(at);
            for (int j = 1; j < 4; ++j)
                for (int r = 0; r < R; ++r) part[r] = madd(v[r][j], load(at + 8 * j), part[r]);
            for (int r = 0; r < R; ++r) total[r][n] = Rows::added(part[r], scale[r], total[r][n]);
        }
    }
}

// R rows times N rows of x, which end in zeros up to a multiple of 16: out[r][n]. The N rows read a value of x, and the
// R rows what was made of their bits, once. What a row's sum is depends on neither. As many bytes are prefetched at
// `ahead`, from which R rows lie `apart`.
template <int R, int N, class Rows>
inline __attribute__((always_inline)) void dots(const Rows (&rows)[R], int64_t K, const float* x, int64_t x_stride,
                                                const char* ahead, int64_t apart, float (&out)[R][N]) {
    Vec total[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) total[r][n] = fill(0);
    int64_t k = 0;
    for (; k + 64 <= K; k += 64, ahead += Rows::BYTES) {
        for (int r = 0; r < R; ++r)
            for (int64_t line = 0; line < Rows::BYTES; line += 64) __builtin_prefetch(ahead + r * apart + line);
        add_64<true>(rows, k, x, x_stride, total);
    }
    if (Rows::HALF && k < K) add_64<false>(rows, k, x, x_stride, total);
    for (; !Rows::HALF && k < K; k += 8) {
        for (int r = 0; r < R; ++r) {
            const Vec v = rows[r].rest(k, K - k);
            for (int n = 0; n < N; ++n) total[r][n] = madd(v, load(x + n * x_stride + k), total[r][n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) out[r][n] = sum(total[r][n]);
}

// ---- rows in 4 bits ------------------------------------------------------------------------------------------------

// The scales of row i of a matrix in 4 bits, and zeros up to the next multiple of 8.
inline void scales_of(const PackedNF4& w, int64_t i, int64_t K, float* out) {
    const int64_t first = i * K / w.block, count = K / w.block;
    std::memset(out + count / 8 * 8, 0, 8 * sizeof(float));
    if (!w.nested) {
        std::memcpy(out, static_cast<const float*>(w.absmax) + first, static_cast<size_t>(count) * 4);
        return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(w.absmax) + first;
    for (int64_t b = 0; b < count; ++b) out[b] = w.map[codes[b]];
    const Vec offset = fill(*w.offset), largest = fill(w.largest);
    for (int64_t b = 0; b < count;) {
        const Vec nested = fill(w.nested[(first + b) / GROUP]);
        const int64_t end = smaller(count, (first + b) / GROUP * GROUP + GROUP - first);
        for (; b + 8 <= end; b += 8) store(smaller(largest, load(out + b) * nested + offset), out + b);
        if (b < end) {
            const First part{end - b};
            store(smaller(largest, load(out + b, part) * nested + offset), out + b, part);
        }
        b = end;
    }
}

constexpr float NO_LEVELS[16] = {};

#if defined(__AVX512F__)
// Puts a row of x into the order in which codes come out: 64 bytes of codes are 16 words of 8 values, and a shift brings
// one value of each word down. So 128 values of x are 8 vectors: of the values 1, 9, .., 121, then of 0, 8, .., 120, of
// 3, 11, .. and so on, as the first of two values is the upper half of a byte. Zeros fill up the last 128.
constexpr int64_t DEALT = 128;
inline void deal(const float* x, int64_t K, float* out) {
    const __m512i words = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    for (int64_t k = 0; k < K; k += DEALT, out += DEALT) {
        const auto here = static_cast<__mmask16>(K - k < DEALT ? (1u << (K - k) / 8) - 1 : 0xffff);
        for (int j = 0; j < 8; ++j)
            _mm512_storeu_ps(out + 16 * j, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), here, words, x + k + (j ^ 1), 4));
    }
}

struct Levels {
    __m512 levels;
    explicit Levels(const float* table) : levels(_mm512_loadu_ps(table)) {}
};

// R rows in 4 bits times N rows of x. A look-up reads the lowest 4 bits of a lane, so that a shift is all that a code
// needs. The sum of 4 products is multiplied by the scales: a lane has values of one word, and so of one block.
template <int R, int N>
inline void dots_nf4(const PackedNF4& w, const Levels& levels, int64_t i, int64_t K, const float* x, int64_t x_stride,
                     float* scales, const char* ahead, int64_t apart, float (&out)[R][N]) {
    const __m512 table = levels.levels;
    const int64_t wide = (K / w.block + 15) / 8 * 8;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.block));
    __m512i block = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    block = _mm512_srl_epi32(block, _mm_cvtsi32_si128(shift));
    const uint8_t* codes = w.codes + i * K / 2;
    for (int r = 0; r < R; ++r) scales_of(w, i + r, K, scales + r * wide);
    __m512 total[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) total[r][n] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += DEALT) {
        const auto here = static_cast<__mmask16>(K - k < DEALT ? (1u << (K - k) / 8) - 1 : 0xffff);
        __m512i words[R];
        __m512 scale[R];
        for (int r = 0; r < R; ++r) {
            __builtin_prefetch(ahead + r * apart + k / 2);
            words[r] = _mm512_maskz_loadu_epi32(here, codes + (r * K + k) / 2);
            const __m128 four = _mm_loadu_ps(scales + r * wide + (k >> shift));
            scale[r] = _mm512_permutexvar_ps(block, _mm512_castps128_ps512(four));
        }
        for (int h = 0; h < 2; ++h) {
            __m512 v[R][4];
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < 4; ++j)
                    v[r][j] = _mm512_permutexvar_ps(_mm512_srli_epi32(words[r], 16 * h + 4 * j), table);
            const float* at = x + k + 64 * h;
            for (int n = 0; n < N; ++n, at += x_stride) {
                __m512 part[R];
                for (int r = 0; r < R; ++r) part[r] = _mm512_mul_ps(v[r][0], _mm512_loadu_ps(at));
                for (int j = 1; j < 4; ++j)
                    for (int r = 0; r < R; ++r) part[r] = _mm512_fmadd_ps(v[r][j], _mm512_loadu_ps(at + 16 * j), part[r]);
                for (int r = 0; r < R; ++r) total[r][n] = _mm512_fmadd_ps(part[r], scale[r], total[r][n]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) out[r][n] = _mm512_reduce_add_ps(total[r][n]);
}
#else
constexpr int64_t DEALT = 64;

#if defined(__AVX2__)
// Puts a row of x into the order in which look_up finds levels. Of each 64 values: those of the higher codes of 32
// bytes, then those of the lower ones, both as 4 vectors of bytes 0-3 and 16-19, 4-7 and 20-23, and so on. So the lower
// half of a vector belongs to the first 32 values, which may have a scale of their own. Zeros fill up the last 64.
inline void deal(const float* x, int64_t K, float* out) {
    for (int64_t k = 0; k < K; k += 64, out += 64) {
        for (int j = 0; j < 4; ++j) {
            const __m256 a = _mm256_loadu_ps(x + k + 8 * j);
            const __m256 b = K - k > 32 ? _mm256_loadu_ps(x + k + 32 + 8 * j) : _mm256_setzero_ps();
            const __m256 first = _mm256_permute2f128_ps(a, b, 0x20), last = _mm256_permute2f128_ps(a, b, 0x31);
            _mm256_storeu_ps(out + 8 * j, _mm256_shuffle_ps(first, last, 0x88));
            _mm256_storeu_ps(out + 32 + 8 * j, _mm256_shuffle_ps(first, last, 0xdd));
        }
    }
}

// The four bytes of each of 16 levels in fp32, a register for the first bytes, one for the second ones, and so on.
// AVX2 looks 32 bytes up at once, but 8 values only with twice the work for each; so bytes are looked up, and joined.
struct Levels {
    __m256i bytes[4];
    explicit Levels(const float* table) {
        alignas(16) uint8_t rows[4][16];
        for (int i = 0; i < 16; ++i) {
            uint8_t value[4];
            std::memcpy(value, table + i, 4);
            for (int j = 0; j < 4; ++j) rows[j][i] = value[j];
        }
        for (int j = 0; j < 4; ++j)
            bytes[j] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(rows[j])));
    }
};

// The levels of 32 codes, in the order of `deal`.
inline __attribute__((always_inline)) void look_up(const Levels& table, __m256i codes, Vec (&out)[4]) {
    __m256i b[4];
    for (int j = 0; j < 4; ++j) b[j] = _mm256_shuffle_epi8(table.bytes[j], codes);
    const __m256i low = _mm256_unpacklo_epi8(b[0], b[1]), low_rest = _mm256_unpackhi_epi8(b[0], b[1]);
    const __m256i high = _mm256_unpacklo_epi8(b[2], b[3]), high_rest = _mm256_unpackhi_epi8(b[2], b[3]);
    out[0].v = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
    out[1].v = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
    out[2].v = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low_rest, high_rest));
    out[3].v = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low_rest, high_rest));
}

#else
inline void deal(const float* x, int64_t K, float* out) {
    std::memcpy(out, x, static_cast<size_t>(K) * 4);
    std::memset(out + K, 0, static_cast<size_t>((K + 63) / 64 * 64 - K) * 4);
}

struct Levels {
    const float* table;
    explicit Levels(const float* table) : table(table) {}
};
#endif

// A row in 4 bits: levels without their scales, by which the sum of 32 products is multiplied. A block is 32 values if
// it is SMALL, otherwise a multiple of 64.
template <bool SMALL>
struct Row4 {
    static constexpr int64_t BYTES = 32;
    static constexpr bool HALF = true;
    const uint8_t* codes;
    const float* scales;
    const Levels* levels;
    int shift;  // 2^shift values are a block

#if defined(__AVX2__)
    // the second half is that of the lower codes; where 32 values are left, they are multiplied by zeros
    template <bool WHOLE>
    __attribute__((always_inline)) void values(int64_t k, int h, Vec (&out)[4]) const {
        const auto* at = reinterpret_cast<const __m128i*>(codes + k / 2);
        const __m256i both = WHOLE ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
                                   : _mm256_zextsi128_si256(_mm_loadu_si128(at));
        look_up(*levels, _mm256_and_si256(h ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15)), out);
    }
    Vec scale(int64_t k, int) const {
        const __m256 low = _mm256_broadcast_ss(scales + (k >> shift));
        return {SMALL ? _mm256_blend_ps(low, _mm256_broadcast_ss(scales + k / 32 + 1), 0xf0) : low};
    }
#else
    template <bool WHOLE>
    void values(int64_t k, int h, Vec (&out)[4]) const {
        float found[32] = {};
        for (int64_t j = 0; j < 16 && (WHOLE || h == 0); ++j) {
            const uint8_t byte = codes[k / 2 + 16 * h + j];
            found[2 * j] = levels->table[byte >> 4];
            found[2 * j + 1] = levels->table[byte & 15];
        }
        for (int j = 0; j < 4; ++j) out[j] = load(found + 8 * j);
    }
    Vec scale(int64_t k, int h) const { return fill(scales[(k + 32 * h) >> shift]); }
#endif
    static Vec added(Vec part, Vec scale, Vec total) { return madd(part, scale, total); }
    Vec rest(int64_t, int64_t) const { return fill(0); }
};

template <bool SMALL, int R, int N>
inline void dots_4(const PackedNF4& w, const Levels& levels, int64_t i, int64_t K, const float* x, int64_t x_stride,
                   float* scales, const char* ahead, int64_t apart, float (&out)[R][N]) {
    const Levels table = levels;  // a copy, which no store can change
    const int64_t wide = (K / w.block + 15) / 8 * 8;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.block));
    Row4<SMALL> rows[R];
    for (int r = 0; r < R; ++r) {
        scales_of(w, i + r, K, scales + r * wide);
        rows[r] = {w.codes + (i + r) * K / 2, scales + r * wide, &table, shift};
    }
    dots<R, N>(rows, K, x, x_stride, ahead, apart, out);
}

template <int R, int N>
inline void dots_nf4(const PackedNF4& w, const Levels& levels, int64_t i, int64_t K, const float* x, int64_t x_stride,
                     float* scales, const char* ahead, int64_t apart, float (&out)[R][N]) {
    if (w.block == 32) return dots_4<true>(w, levels, i, K, x, x_stride, scales, ahead, apart, out);
    dots_4<false>(w, levels, i, K, x, x_stride, scales, ahead, apart, out);
}
#endif

// Row i of a matrix of K columns, made dense.
inline void unpack(const PackedWeight& w, int64_t i, int64_t K, float* out) {
    if (w.values) {
        for (int64_t k = 0; k < K; ++k) out[k] = static_cast<float>(w.values[i * K + k]) * w.scale[i] * (1.0f / 127);
        return;
    }
    const Decoder<float> decode(w.nf4);
    const int64_t size = w.nf4.block, first = i * K / size;
    for (int64_t b = 0; b < K / size; ++b)
        decode(first + b, scale_of(w.nf4, first + b), size, out + b * size);
}

// ---- a matrix of any kind ------------------------------------------------------------------------------------------

// Rows of K values, dense as W or packed.
template <class W>
struct Matrix {
    const W* dense;
    const PackedWeight* packed;  // in the place of `dense`, or null
    int64_t K;

    bool in_4_bits() const { return packed && !packed->values; }

    // The bytes of a row, and where row i begins
    int64_t bytes() const { return K * bits() / 8; }
    int64_t bits() const { return packed ? packed->values ? 8 : 4 : 8 * static_cast<int64_t>(sizeof(W)); }
    const char* row(int64_t i) const {
        const void* first = dense;
        if (packed) first = packed->values ? static_cast<const void*>(packed->values) : packed->nf4.codes;
        return static_cast<const char*>(first) + i * bytes();
    }
};

}  // namespace
