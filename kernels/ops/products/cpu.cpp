// Sums of products of matrices in bf16, of which a factor may be stored in 4 bits (__init__.py says what for):
//
//     out [M, N] = scale * sum over the terms of  a [M, depth] b [depth, N]   + bias [N]
//
// A thread takes some 64 columns at a time and lays out the b of all terms for them, a panel, in its own cache: of two
// values that follow each other along the depth one word of 32 bits, the words of the columns side by side, as
// vdpbf16ps (AVX512-BF16) multiplies them: sixteen sums in fp32 += sixteen pairs of a times sixteen pairs of b. With
// 6 rows x 64 columns of sums in registers a word of a is loaded once for all columns and a vector of b once for all
// rows: 10 loads for 24 multiplications, of which the processor does two a cycle. The instruction takes subnormal
// numbers for zero. Of an NF4 row a block's 16 levels are scaled and rounded to bf16 once, as `dequantize` rounds them,
// and a permute looks 32 values up; laying out takes a thirtieth of the time that 512 rows take to be multiplied.
//
// Every thread has a share of the tiles of every sum, takes some at a time, and helps with the other shares when its own
// is done: a thread that comes late, or not at all, holds nobody up. Two may lay out the same panel. A sum runs over the
// depth in order, in one thread: who takes a tile changes no bit.
#include "../nf4/packed.h"

#if defined(__AVX512BF16__)

namespace {

// A matrix [rows, columns], row by row (cpu.py has the same layouts).
struct Matrix {
    const void* data;         // bf16 or fp32
    int64_t stride;           // values from one row to the next
    int64_t kind;             // 0 bf16, 1 fp32, 2 packed
    float factor;             // fp32 values times this
    const PackedNF4* packed;  // in blocks of a multiple of 64
};

struct Term {
    const uint16_t* a;
    int64_t a_stride, depth;  // of a, even
    Matrix b;
    int64_t b_depth, turned;  // zeros after b_depth; turned: b is [N, b_depth]
};

struct Sum {
    const Term* terms;
    int64_t count, M, N;
    void* out;
    int64_t out_stride, wide;  // wide: fp32, otherwise bf16
    float scale;
    const float* bias;  // or null
};

struct alignas(64) Share {
    int64_t taken;  // tiles
};

struct Sums {
    const Sum* sums;
    uint32_t* space;  // [threads, size]
    Share* shares;    // [count, threads], zero at first
    int64_t count, threads, size;
};

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

// Sixteen vectors as the rows of a matrix of words become its columns.
inline void transpose(__m512i (&a)[16]) {
    __m512i b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 i + j]: of rows 4 i .. 4 i + 3 the words j, 4 + j, 8 + j, 12 + j
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        a[j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88);
        a[8 + j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd);
        a[4 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88);
        a[12 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd);
    }
}

// Columns [first, first + columns) of b, of which each pair along the depth is a line of `lanes` words.
void pack(const Term& t, int64_t first, int64_t columns, int64_t lanes, uint32_t* panel) {
    if (t.turned) {
        for (int64_t group = 0; group < lanes; group += 16) {
            for (int64_t k = 0; k < t.depth; k += 64) {
                __m512i half[2][16];
                for (int64_t i = 0; i < 16; ++i) {
                    __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                    if (group + i < columns) load64(t.b, first + group + i, k, t.b_depth - k, both);
                    half[0][i] = both[0], half[1][i] = both[1];
                }
                for (int64_t h = 0; h < 2; ++h) {
                    const int64_t pairs = simd::smaller(16, (t.depth - k) / 2 - 16 * h);
                    if (pairs <= 0) break;
                    transpose(half[h]);
                    for (int64_t p = 0; p < pairs; ++p)
                        _mm512_storeu_si512(panel + (k / 2 + 16 * h + p) * lanes + group, half[h][p]);
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

// `left` or more of sixteen sums; a store with a mask takes many times longer.
inline void put(const Sum& p, __m512 sums, int64_t at, int64_t left) {
    const __mmask16 some = first_lanes(left);
    if (p.wide) {
        float* to = static_cast<float*>(p.out) + at;
        left >= 16 ? _mm512_storeu_ps(to, sums) : _mm512_mask_storeu_ps(to, some, sums);
        return;
    }
    const __m256i y = (__m256i)_mm512_cvtneps_pbh(sums);
    uint16_t* to = static_cast<uint16_t*>(p.out) + at;
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
        const char* a = reinterpret_cast<const char*>(t.a + row * t.a_stride);
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
        for (int i = 0; i < R; ++i) put(p, _mm512_fmadd_ps(sums[i][z], scale, bias), at + i * p.out_stride, left);
    }
}

template <int R, int Z>
void rows(const Sum& p, int64_t row, int64_t count, int64_t first, int64_t columns, const uint32_t* panel) {
    if (count == R) return tile<R, Z>(p, row, first, columns, panel);
    if constexpr (R > 1) rows<R - 1, Z>(p, row, count, first, columns, panel);
}

constexpr int64_t TOGETHER = 2 << 20;  // products of two values, in the tiles that a thread takes at a time: some 10 us

// One sum, cut into tiles: panel after panel, each from the first row to the last.
struct Tiles {
    const Sum& p;
    const int64_t vectors = simd::smaller(4, (p.N + 15) / 16), lanes = 16 * vectors;
    const int64_t high = vectors == 1 ? 12 : 6;  // so many sums as keep the multipliers busy
    const int64_t tall = (p.M + high - 1) / high, all = (p.N + lanes - 1) / lanes * tall;
    uint32_t* panel;
    int64_t packed = -1;  // the first column of the panel that is laid out

    Tiles(const Sum& sum, uint32_t* space) : p(sum), panel(space) {}

    int64_t together() const {
        int64_t depth = 1;
        for (int64_t n = 0; n < p.count; ++n) depth += p.terms[n].depth;
        return 1 + TOGETHER / (high * lanes * depth);
    }

    void pack_panel(int64_t first, int64_t columns) {
        uint32_t* place = panel;
        for (int64_t n = 0; n < p.count; ++n) {
            pack(p.terms[n], first, columns, lanes, place);
            place += p.terms[n].depth / 2 * lanes;
        }
        packed = first;
    }

    void add_up(int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
            const int64_t first = i / tall * lanes, row = i % tall * high;
            const int64_t columns = simd::smaller(lanes, p.N - first), count = simd::smaller(high, p.M - row);
            if (first != packed) pack_panel(first, columns);
            switch (vectors) {
                case 4: rows<6, 4>(p, row, count, first, columns, panel); break;
                case 3: rows<6, 3>(p, row, count, first, columns, panel); break;
                case 2: rows<6, 2>(p, row, count, first, columns, panel); break;
                default: rows<12, 1>(p, row, count, first, columns, panel);
            }
        }
    }
};

void work(void* data, int64_t from, int64_t to) {
    const Sums& all = *static_cast<const Sums*>(data);
    for (int64_t thread = from; thread < to; ++thread)
        for (int64_t n = 0; n < all.count; ++n) {
            Tiles tiles(all.sums[n], all.space + thread * all.size);
            const int64_t together = tiles.together();
            for (int64_t i = 0; i < all.threads; ++i) {
                const int64_t share = (thread + i) % all.threads;
                const int64_t first = tiles.all * share / all.threads, end = tiles.all * (share + 1) / all.threads;
                for (;;) {
                    Share& its = all.shares[n * all.threads + share];
                    const int64_t at = first + __atomic_fetch_add(&its.taken, together, __ATOMIC_RELAXED);
                    if (at >= end) break;
                    tiles.add_up(at, simd::smaller(at + together, end));
                }
            }
        }
}

}  // namespace

extern "C" void LK_EXPORT(sums_of_products)(Sums* sums) {
    int64_t products = 0;
    for (int64_t n = 0; n < sums->count; ++n) {
        const Sum& p = sums->sums[n];
        for (int64_t i = 0; i < p.count; ++i) products += p.M * p.N * p.terms[i].depth;
    }
    sums->threads = simd::smaller(sums->threads, 1 + products / TOGETHER);
    lk_parallel_for(sums->threads, 1, work, sums);
}

#endif
