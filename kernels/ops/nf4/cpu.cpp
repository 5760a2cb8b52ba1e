// NF4 and FP4 on the CPU: blockwise quantize to packed codes and scales, dequantize to fp32 or bf16, and multiply a few
// rows by a packed matrix.
//
// The layout and the roundings are those of reference.py, bit for bit: scaled = x * (1 / scale) in fp32, the
// code belongs to the level that has as many levels below it as there are thresholds strictly below that value,
// element 2i sits in the high nibble of byte i. The search adds squared errors in the order of reference.py, so
// that both keep the same scale.
//
// Dequantizing a block first scales the 16 table entries (16 products instead of block_size, each rounded as the
// product of one element would be), then only looks values up: on AVX2 eight at a time from two registers, on
// AVX-512 from one, 16 in fp32 or 32 in bf16. The scales of double quantization are made on the way, a group of them at
// a time.
//
// Blocks are counted over the flattened tensor, so a row length that is no multiple of the block size is fine.
#include "packed.h"

namespace {

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

#if defined(__AVX512F__)
__m512 wide16(const float* p) { return _mm512_loadu_ps(p); }
__m512 wide16(const uint16_t* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// The same of sixteen values. What is found is 0 or 8, then 4 more or not, then 2, then 1; whether it is `step` more the
// threshold of that number, found + step - 1, decides, so that a table which begins with threshold step - 1 has it at
// the index `found`.
struct Halving16 {
    __m512 middle, half, quarter, eighth;
};

Halving16 halving16(const float* t) {
    return {_mm512_set1_ps(t[7]), _mm512_maskz_loadu_ps(0x0fff, t + 3), _mm512_maskz_loadu_ps(0x3fff, t + 1),
            _mm512_maskz_loadu_ps(0x7fff, t)};
}

__m512i further(__m512i found, __m512 threshold, __m512 v, int step) {  // found + step where threshold < v
    const __mmask16 below = _mm512_cmp_ps_mask(threshold, v, _CMP_LT_OQ);
    return _mm512_mask_or_epi32(found, below, found, _mm512_set1_epi32(step));
}

__m512i thresholds_below(const Halving16& h, __m512 v) {
    __m512i found = further(_mm512_setzero_si512(), h.middle, v, 8);
    found = further(found, _mm512_permutexvar_ps(found, h.half), v, 4);
    found = further(found, _mm512_permutexvar_ps(found, h.quarter), v, 2);
    return further(found, _mm512_permutexvar_ps(found, h.eighth), v, 1);
}

// 64 values to 32 bytes.
template <class T>
void encode64(const Halving16& h, __m128i order, const T* x, float inverse, uint8_t* out) {
    __m512i found[4];
    for (int i = 0; i < 4; ++i)
        found[i] = thresholds_below(h, _mm512_mul_ps(wide16(x + 16 * i), _mm512_set1_ps(inverse)));
    // as in encode32: lane j of the result has four values of each of the four vectors
    const __m512i words = _mm512_packus_epi16(_mm512_packus_epi32(found[0], found[1]),
                                              _mm512_packus_epi32(found[2], found[3]));
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(lanes, words);
    const __m512i codes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(order), bytes);
    const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(pairs));
}
#endif

template <class T>
__attribute__((noinline)) void encode_rest(const float* thresholds, const uint8_t* order, const T* x, float inverse,
                                           int64_t count, uint8_t* out) {
    int32_t index[64];
    for (int64_t at = 0; at < count; at += 64) {
        const int64_t step = count - at < 64 ? count - at : 64;
        index[step % 64] = 7;  // the padding of an odd length: 0 lies above 7 thresholds in both tables
        for (int64_t i = 0; i < step; ++i) {
            const float v = simd::widen(x[at + i]) * inverse;
            int32_t below = 0;
#pragma GCC unroll 15  // and the loop over i becomes vectors
            for (int t = 0; t < 15; ++t) below += thresholds[t] < v;
            index[i] = below;
        }
        for (int64_t i = 0; i < (step + 1) / 2; ++i)
            out[at / 2 + i] = static_cast<uint8_t>(order[index[2 * i]] << 4 | order[index[2 * i + 1]]);
    }
}

// Finds the codes of block after block. Holds copies of what it reads, which no store can change, so that they stay in
// registers.
template <class T>
struct Encoder {
    Quantize<T> q;
#if defined(__AVX2__)
    Halving h;
    __m128i order;
#endif
#if defined(__AVX512F__)
    Halving16 h16;
#endif
    explicit Encoder(const Quantize<T>& quantize) : q(quantize) {
#if defined(__AVX2__)
        h = halving(q.thresholds);
        order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q.order));
#endif
#if defined(__AVX512F__)
        h16 = halving16(q.thresholds);
#endif
    }

    __attribute__((always_inline)) void operator()(int64_t b, float scale) const {
        const int64_t start = b * q.block, count = count_of(q.n, q.block, b);
        const float inverse = reciprocal(scale, q.floor);
        const T* x = q.x + start;
        uint8_t* out = q.codes + start / 2;
        int64_t at = 0;
#if defined(__AVX512F__)
        for (; at + 64 <= count; at += 64) encode64(h16, order, x + at, inverse, out + at / 2);
#endif
#if defined(__AVX2__)
        for (; at + 32 <= count; at += 32) encode32(h, order, x + at, simd::fill(inverse), out + at / 2);
#endif
        if (at < count) encode_rest(q.thresholds, q.order, x + at, inverse, count - at, out + at / 2);
    }
};

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
    const Encoder<T> encode(*static_cast<const Quantize<T>*>(data));
    for (int64_t b = first; b < last; ++b) encode(b, encode.q.scales[b]);
}

template <class T>
void quantize_blocks(void* data, int64_t first, int64_t last) {
    const Encoder<T> encode(*static_cast<const Quantize<T>*>(data));
    const Quantize<T>& q = encode.q;
    for (int64_t b = first; b < last; ++b) {
        const float scale = absmax_of(q.x + b * q.block, count_of(q.n, q.block, b));
        q.scales[b] = scale;
        encode(b, scale);
    }
}

struct QuantizeScales {
    const float* absmax;    // [n]
    const float* middles;   // [255], of the neighbours in the dynamic map
    uint8_t* codes;         // [n]
    float* nested;          // [ceil(n / GROUP)]
    int64_t n;
    float offset, floor;
};

void quantize_scales(void* data, int64_t first, int64_t last) {
    const QuantizeScales q = *static_cast<const QuantizeScales*>(data);
    const float* __restrict middles = q.middles;
    uint8_t* __restrict codes = q.codes;
    for (int64_t g = first; g < last; ++g) {
        const int64_t count = count_of(q.n, GROUP, g);
        float residue[GROUP];
        int32_t below[GROUP] = {};
        for (int64_t i = 0; i < count; ++i) residue[i] = q.absmax[g * GROUP + i] - q.offset;
        q.nested[g] = absmax(residue, count);
        const float inverse = reciprocal(q.nested[g], q.floor);
        for (int64_t i = 0; i < count; ++i) residue[i] *= inverse;
        for (int32_t step = 128; step > 0; step /= 2)  // by halving
            for (int64_t i = 0; i < count; ++i)
                below[i] += middles[below[i] + step - 1] < residue[i] ? step : 0;
        for (int64_t i = 0; i < count; ++i) codes[g * GROUP + i] = static_cast<uint8_t>(below[i]);
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

// f(b, scale) for the blocks in [first, last)
template <class F>
void for_blocks(const PackedNF4& w, int64_t first, int64_t last, F f) {
    while (first < last) {
        const int64_t group = first / GROUP, end = simd::smaller((group + 1) * GROUP, last);
        float made[GROUP];
        const float* scales = static_cast<const float*>(w.absmax) + first;
        if (w.nested) {
            const uint8_t* codes = static_cast<const uint8_t*>(w.absmax) + first;
            const float nested = w.nested[group], offset = *w.offset;
            for (int64_t i = 0; i < end - first; ++i) made[i] = double_quantized(w, codes[i], nested, offset);
            scales = made;
        }
        for (int64_t b = first; b < end; ++b) f(b, scales[b - first]);
        first = end;
    }
}

struct Dequantize {
    PackedNF4 w;
    void* out;      // [n], fp32 or bf16
    int64_t first;  // the block that out begins with
    int64_t n;
};

template <class T>
void dequantize_blocks(void* data, int64_t first, int64_t last) {
    const Dequantize& d = *static_cast<const Dequantize*>(data);
    const Decoder<T> decode(d.w);
    const int64_t n = d.n, skipped = d.first;
    T* out = static_cast<T*>(d.out);
    for_blocks(d.w, skipped + first, skipped + last, [=](int64_t b, float scale) {
        const int64_t at = b - skipped;
        decode(b, scale, count_of(n, decode.block, at), out + at * decode.block);
    });
}

// ---- products of a few rows ----------------------------------------------------------------------------------------
//
// y = x W^T + bias. TILE rows of W are made dense a piece of DEPTH values at a time, which the nearest cache holds, and
// multiplied by all rows of x: W itself is read once, packed. A sum over a piece runs in the lanes of a register, which
// are added up at its end, and the pieces' sums in their order: the same for a row of x whatever the others are, and
// for any number of threads. AVX512-BF16's products take subnormal numbers for 0.

struct Product {
    PackedNF4 w;         // [N, K], K a multiple of the block
    const void* x;       // [M, K], fp32 or bf16
    const float* bias;   // [N], or null
    void* y;             // [M, N], as x
    int64_t M, N, K;
};

constexpr int TILE = 8;
constexpr int64_t DEPTH = 1024;
constexpr int64_t ROWS = 64;  // of x, between which W is made again
#if defined(__AVX512F__)
constexpr int TOGETHER = 2;  // rows of x: registers for TOGETHER * TILE sums
#else
constexpr int TOGETHER = 1;
#endif

template <class T>
struct Dot {
    using Sum = simd::Vec;
    static constexpr int64_t LANES = 8;
    static Sum zero() { return simd::fill(0); }
    static Sum add(Sum sum, const T* a, const T* b) { return simd::madd(simd::load(a), simd::load(b), sum); }
    static float total(Sum sum) { return simd::sum(sum); }
};
#if defined(__AVX512F__)
struct Dot512 {
    using Sum = __m512;
    static Sum zero() { return _mm512_setzero_ps(); }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
};
template <>
struct Dot<float> : Dot512 {
    static constexpr int64_t LANES = 16;
    static Sum add(Sum sum, const float* a, const float* b) {
        return _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), sum);
    }
};
#endif
#if defined(__AVX512BF16__)
template <>
struct Dot<uint16_t> : Dot512 {
    static constexpr int64_t LANES = 32;
    static __m512bh load(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Sum add(Sum sum, const uint16_t* a, const uint16_t* b) { return _mm512_dpbf16_ps(sum, load(a), load(b)); }
};
#endif

// Adds to sums [COUNT, TILE] the products of rows of x [COUNT, K] and w [TILE, depth].
template <int COUNT, class T>
void multiply(const T* x, int64_t K, const T* w, int64_t depth, float* sums) {
    using D = Dot<T>;
    typename D::Sum sum[COUNT][TILE];
    for (int m = 0; m < COUNT; ++m)
        for (int n = 0; n < TILE; ++n) sum[m][n] = D::zero();
    for (int64_t k = 0; k < depth; k += D::LANES)
        for (int n = 0; n < TILE; ++n)
            for (int m = 0; m < COUNT; ++m) sum[m][n] = D::add(sum[m][n], w + n * depth + k, x + m * K + k);
    for (int m = 0; m < COUNT; ++m)
        for (int n = 0; n < TILE; ++n) sums[m * TILE + n] += D::total(sum[m][n]);
}

template <class T>
void multiply_tiles(void* data, int64_t first, int64_t last) {
    const Product& p = *static_cast<const Product*>(data);
    const int64_t K = p.K, of_row = K / p.w.block, step = p.w.block > DEPTH ? p.w.block : DEPTH;
    const Decoder<T> decode(p.w);
    alignas(64) T dense[TILE * kLargestBlock];
    for (int64_t tile = first; tile < last; ++tile)
        for (int64_t from = 0; from < p.M; from += ROWS) {
            const int64_t n = tile * TILE, rows = simd::smaller(TILE, p.N - n), M = simd::smaller(ROWS, p.M - from);
            const T* x = static_cast<const T*>(p.x) + from * K;
            float sums[ROWS * TILE] = {};
            for (int64_t k = 0; k < K; k += step) {
                const int64_t depth = simd::smaller(step, K - k);
                for (int64_t r = 0; r < TILE; ++r) {
                    T* out = dense + r * depth;
                    if (r >= rows) {
                        std::memset(out, 0, static_cast<size_t>(depth) * sizeof(T));
                        continue;
                    }
                    const int64_t b = (n + r) * of_row + k / p.w.block;
                    for_blocks(p.w, b, b + depth / p.w.block, [=](int64_t at, float scale) {
                        decode(at, scale, decode.block, out + (at - b) * decode.block);
                    });
                }
                int64_t m = 0;
                for (; m + TOGETHER <= M; m += TOGETHER)
                    multiply<TOGETHER>(x + m * K + k, K, dense, depth, sums + m * TILE);
                for (; m < M; ++m) multiply<1>(x + m * K + k, K, dense, depth, sums + m * TILE);
            }
            T* y = static_cast<T*>(p.y) + from * p.N + n;
            for (int64_t m = 0; m < M; ++m)
                for (int64_t r = 0; r < rows; ++r)
                    store(sums[m * TILE + r] + (p.bias ? p.bias[n + r] : 0.0f), y + m * p.N + r);
        }
}

template <class T>
void multiply_rows(Product& p) {
    const int64_t grain = simd::GRAIN / (TILE * (p.K > 0 ? p.K : 1));
    lk_parallel_for((p.N + TILE - 1) / TILE, grain > 0 ? grain : 1, multiply_tiles<T>, &p);
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

void LK_EXPORT(nf4_quantize_scales)(const float* absmax, const float* middles, uint8_t* codes, float* nested, int64_t n,
                                    float offset, float floor) {
    QuantizeScales q{absmax, middles, codes, nested, n, offset, floor};
    lk_parallel_for(blocks(n, GROUP), 4096 / GROUP, quantize_scales, &q);
}

void LK_EXPORT(nf4_dequantize_fp32)(Dequantize* d) {
    lk_parallel_for(blocks(d->n, d->w.block), grain(d->w.block), dequantize_blocks<float>, d);
}
void LK_EXPORT(nf4_dequantize_bf16)(Dequantize* d) {
    lk_parallel_for(blocks(d->n, d->w.block), grain(d->w.block), dequantize_blocks<uint16_t>, d);
}

void LK_EXPORT(nf4_product_fp32)(Product* p) { multiply_rows<float>(*p); }
void LK_EXPORT(nf4_product_bf16)(Product* p) { multiply_rows<uint16_t>(*p); }

}  // extern "C"
