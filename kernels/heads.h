// What the ops over heads share: views of tensors with heads, and products made of tiles of sums in registers.
//
// A cpu.cpp includes it instead of simd.h, and says before whether it counts on LANES.
#pragma once
#include "simd.h"

namespace {

using namespace simd;

constexpr int64_t LINE = LANES;  // floats of a vector
// A tile has up to TILE rows of ACROSS vectors of sums: 24 of the 32 registers of AVX-512, 12 of the 16 of AVX2.
constexpr int64_t TILE = LINE == 16 ? 8 : 6;
constexpr int64_t ACROSS = LINE == 16 ? 3 : 2;

inline int64_t bigger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int64_t whole(int64_t n) { return tiles(n, 16) * 16; }

// Floats from one row of n to the next: an odd number of cache lines, so that a column of them does not fall on the
// same few places of the cache.
constexpr int64_t width(int64_t n) { return (tiles(n, 16) | 1) * 16; }

inline void clear(float* to, int64_t floats) {
    for (int64_t i = 0; i < floats; i += LINE) store(fill(0), to + i);
}

template <class T>
struct HeadsView {  // [B, T or S, heads, D], dense in D
    T* data;
    int64_t batch, token, head;
    T* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

// One fp32 is a word.
struct Single {
    static constexpr int64_t PAIR = 1;  // values of a word
    static Vec multiply(Vec a, Vec b, Vec sum) { return madd(a, b, sum); }
    static Vec words(const Vec (&x)[1]) { return x[0]; }

    // The values of one row, and zeros that fill up the last word.
    template <class T>
    static void line(const T* x, int64_t D, float* to) {
        vectors(D, [&](int64_t i, auto some) { store(load(x + i, some), to + i); });
    }
    // x[i] are the values from n on of the i-th of PAIR lines.
    static void put(const Vec (&x)[1], float* to, int64_t, int64_t n) { store(x[0], to + n); }
};

// ---- products ------------------------------------------------------------------------------------------------------

// c [rows, columns] = or += a b with a [rows, words], or as it lies a' [words, rows], and b [words, columns]
struct Product {
    const float* a;
    int64_t a_apart;
    const float* b;
    int64_t b_apart;
    int64_t words;
    float* c;
    int64_t c_apart;
    bool add;
};

// M rows and N vectors of it, from column j on.
template <class Op, bool TRANSPOSED, int M, int N>
void tile(const Product& x, int64_t j) {
    Vec sums[M][N];
#pragma GCC unroll 8  // or the sums would live in memory
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) sums[i][n] = x.add ? load(x.c + i * x.c_apart + j + n * LINE) : fill(0);
    const float *a = x.a, *b = x.b + j;
    const int64_t a_apart = x.a_apart, b_apart = x.b_apart;
    for (int64_t k = 0; k < x.words; ++k) {
        Vec line[N];
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) line[n] = load(b + n * LINE);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
            const Vec factor = fill(a[TRANSPOSED ? i : i * a_apart]);
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) sums[i][n] = Op::multiply(factor, line[n], sums[i][n]);
        }
        a += TRANSPOSED ? a_apart : 1;
        b += b_apart;
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 3
        for (int n = 0; n < N; ++n) store(sums[i][n], x.c + i * x.c_apart + j + n * LINE);
}

// The tile of so many rows and vectors, at most M and N.
template <class Op, bool TRANSPOSED, int M = TILE, int N = ACROSS>
void tile(const Product& x, int64_t j, int64_t rows, int64_t across) {
    if constexpr (N > 1)
        if (across < N) return tile<Op, TRANSPOSED, M, N - 1>(x, j, rows, across);
    if constexpr (M > 1)
        if (rows < M) return tile<Op, TRANSPOSED, M - 1, N>(x, j, rows, across);
    tile<Op, TRANSPOSED, M, N>(x, j);
}

// All columns of `rows` <= TILE rows; a multiple of 16.
template <class Op, bool TRANSPOSED>
void multiply(const Product& x, int64_t rows, int64_t columns) {
    for (int64_t j = 0, across; j < columns; j += across * LINE) {
        // rather twice two vectors than three and one, whose few sums would wait for one another
        const int64_t left = (columns - j) / LINE;
        across = left == 4 ? 2 : smaller(left, ACROSS);
        tile<Op, TRANSPOSED>(x, j, rows, across);
    }
}

}  // namespace
