// Sums of pairs of bf16, two products an instruction: vdpbf16ps of AVX512-BF16, which takes subnormal numbers for zero.
//
// A panel has some 64 columns of the b of all terms: of two values that follow each other along the depth one word of 32
// bits, the words of the columns side by side. Sixteen sums in fp32 += sixteen pairs of a times sixteen pairs of b. With
// 6 rows x 64 columns of sums in registers a word of a is loaded once for all columns and a vector of b once for all
// rows: 10 loads for 24 multiplications, of which the processor does two a cycle. Of an NF4 row a block's 16 levels are
// scaled and rounded to bf16 once, as `dequantize` rounds them, and a permute looks 32 values up; laying out takes a
// thirtieth of the time that 512 rows take to be multiplied.
#pragma once
#include "sums.h"

#if defined(__AVX512BF16__)

namespace {
namespace pairs {

// ---- panels --------------------------------------------------------------------------------------------------------

inline __m512i bf16_of(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// The 64 values of a row that begin at `column`, as bf16; zeros from `count` on. Codes begin with a block.
inline void load64(const Matrix& m, int64_t row, int64_t column, int64_t count, __m512i (&out)[2]) {
    const int64_t at = row * m.stride + column;
    if (m.kind == 2) {
        const PackedNF4& w = *m.packed;
        Table32 table;
        make_table(_mm512_loadu_ps(w.table), scale_of(w, at / w.block), table);
        for (int64_t i = 0; i < 2; ++i) out[i] = looked_up32(table, w.codes + at / 2 + 16 * i);
        return;
    }
    const uint64_t mask = count >= 64 ? ~0ull : count > 0 ? (1ull << count) - 1 : 0;
    if (m.kind == 0) {
        const uint16_t* x = static_cast<const uint16_t*>(m.data) + at;
        out[0] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), x);
        out[1] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask >> 32), x + 32);
        return;
    }
    const float* x = static_cast<const float*>(m.data) + at;
    const __m512 factor = _mm512_set1_ps(m.factor);
    __m512 part[4];
    for (int i = 0; i < 4; ++i)
        part[i] = _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> (16 * i)), x + 16 * i));
    out[0] = bf16_of(part[0], part[1]);
    out[1] = bf16_of(part[2], part[3]);
}

// Columns [first, first + columns) of b, of which each pair along the depth is a line of `lanes` words.
void pack(const Term& t, int64_t first, int64_t columns, int64_t lanes, uint32_t* panel) {
    if (t.turned) {
        for (int64_t group = 0; group < lanes; group += 16) {
            for (int64_t k = 0; k < t.depth; k += 64) {
                simd::Vec half[2][16];
                for (int64_t i = 0; i < 16; ++i) {
                    __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                    if (group + i < columns) load64(t.b, first + group + i, k, t.b_depth - k, both);
                    for (int64_t h = 0; h < 2; ++h) half[h][i] = {_mm512_castsi512_ps(both[h])};
                }
                for (int64_t h = 0; h < 2; ++h) {
                    const int64_t pairs = simd::smaller(16, (t.depth - k) / 2 - 16 * h);
                    if (pairs <= 0) break;
                    simd::transpose(half[h]);
                    for (int64_t p = 0; p < pairs; ++p)
                        _mm512_storeu_ps(panel + (k / 2 + 16 * h + p) * lanes + group, half[h][p].v);
                }
            }
        }
        return;
    }
    alignas(64) static const uint16_t order[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t k = 0; k < t.depth; k += 2) {
        __m512i even[2] = {}, odd[2] = {};
        if (k < t.b_depth) load64(t.b, k, first, columns, even);
        if (k + 1 < t.b_depth) load64(t.b, k + 1, first, columns, odd);
        uint32_t* line = panel + k / 2 * lanes;
        for (int64_t z = 0; z < lanes / 16; ++z)
            _mm512_storeu_si512(line + 16 * z, _mm512_permutex2var_epi16(even[z / 2], z % 2 ? high : low, odd[z / 2]));
    }
}

// ---- sums ----------------------------------------------------------------------------------------------------------

inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}

// `left` or more of sixteen sums to `out`; a store with a mask takes many times longer.
inline void put(const Sum& p, __m512 sums, void* out, int64_t at, int64_t left) {
    const __mmask16 some = first_lanes(left);
    if (p.wide) {
        float* to = static_cast<float*>(out) + at;
        left >= 16 ? _mm512_storeu_ps(to, sums) : _mm512_mask_storeu_ps(to, some, sums);
        return;
    }
    const __m256i y = (__m256i)_mm512_cvtneps_pbh(sums);
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    left >= 16 ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), y) : _mm256_mask_storeu_epi16(to, some, y);
}

// Rows [row, row + R) times a panel of Z vectors of columns.
template <int R, int Z>
void tile(const Sum& p, int64_t row, int64_t first, int64_t columns, const uint32_t* panel) {
    __m512 sums[R][Z];
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) sums[i][z] = _mm512_setzero_ps();
    for (int64_t n = 0; n < p.count; ++n) {
        const Term& t = p.terms[n];
        if (!t.has(row)) {
            panel += t.depth / 2 * 16 * Z;
            continue;
        }
        const char* a = reinterpret_cast<const char*>(t.from<uint16_t>(row));
        const int64_t apart = 2 * t.a_stride;
        for (int64_t k = 0; k < t.depth; k += 2, a += 4, panel += 16 * Z) {
            __m512bh b[Z];
#pragma GCC unroll 4
            for (int z = 0; z < Z; ++z) b[z] = (__m512bh)_mm512_loadu_si512(panel + 16 * z);
#pragma GCC unroll 12
            for (int i = 0; i < R; ++i) {
                int32_t pair;
                std::memcpy(&pair, a + i * apart, 4);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int z = 0; z < Z; ++z) sums[i][z] = _mm512_dpbf16_ps(sums[i][z], both, b[z]);
            }
        }
    }
    const __m512 scale = _mm512_set1_ps(p.scale);
#pragma GCC unroll 4
    for (int z = 0; z < Z; ++z) {
        const int64_t left = columns - 16 * z, at = row * p.out_stride + first + 16 * z;
        const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(first_lanes(left), p.bias + first + 16 * z) : _mm512_setzero_ps();
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) {
            sums[i][z] = _mm512_fmadd_ps(sums[i][z], scale, bias);
            if (p.out) put(p, sums[i][z], p.out, at + i * p.out_stride, left);
        }
        if (!p.turned) continue;
        simd::Vec square[16] = {};
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) square[i] = {sums[i][z]};
        simd::transpose(square);
        for (int64_t j = 0; j < 16 && j < left; ++j)
            put(p, square[j].v, p.turned, (first + 16 * z + j) * p.turned_stride + row, R);
    }
}

template <int R, int Z>
void rows(const Sum& p, int64_t row, int64_t count, int64_t first, int64_t columns, const uint32_t* panel) {
    if (count == R) return tile<R, Z>(p, row, first, columns, panel);
    if constexpr (R > 1) rows<R - 1, Z>(p, row, count, first, columns, panel);
}

}  // namespace pairs

struct Pairs {
    const Sum& p;
    const int64_t vectors = simd::smaller(4, (p.N + 15) / 16), lanes = 16 * vectors;  // columns of a panel
    const int64_t high = vectors == 1 ? 12 : 6;  // rows of a tile: so many sums as keep the multipliers busy
    const int64_t parts = 1, room = 1;  // of the depth, and tiles whose sums wait: none do
    uint32_t* panel;

    Pairs(const Sum& sum, const Sums&, uint32_t* space) : p(sum), panel(space) {}

    // Lays out columns [first, first + columns), at most `lanes`.
    void pack(int64_t first, int64_t columns, int64_t) {
        uint32_t* place = panel;
        for (int64_t n = 0; n < p.count; ++n) {
            pairs::pack(p.terms[n], first, columns, lanes, place);
            place += p.terms[n].depth / 2 * lanes;
        }
    }

    // Writes these columns of rows [row, row + count), at most `high`.
    void add_up(int64_t, int64_t, int64_t row, int64_t count, int64_t first, int64_t columns) {
        switch (vectors) {
            case 4: return pairs::rows<6, 4>(p, row, count, first, columns, panel);
            case 3: return pairs::rows<6, 3>(p, row, count, first, columns, panel);
            case 2: return pairs::rows<6, 2>(p, row, count, first, columns, panel);
            default: return pairs::rows<12, 1>(p, row, count, first, columns, panel);
        }
    }
};

}  // namespace

#endif
