// The arguments of sums_of_products, as cpu.py lays them out.
#pragma once
#include "../nf4/packed.h"

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
    const void* a;            // bf16, or fp32 (Sums::singles)
    int64_t a_stride, depth;  // of a; even for Pairs
    int64_t first, end;       // the rows of the sum that a has
    Matrix b;
    int64_t b_depth, turned;  // zeros after b_depth; turned: b is [N, b_depth]

    bool has(int64_t row) const { return first <= row && row < end; }
    template <class T>
    const T* from(int64_t row) const { return static_cast<const T*>(a) + (row - first) * a_stride; }
};

struct Sum {
    const Term* terms;
    int64_t count, M, N;
    void* out;     // row by row, or null
    void* turned;  // the same column by column, or null
    int64_t out_stride, turned_stride, wide;  // wide: fp32, otherwise bf16
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
    int64_t pairs, singles;  // whether Pairs multiply, and whether a is fp32
};

inline int64_t depth_of(const Sum& p) {
    int64_t depth = 0;
    for (int64_t n = 0; n < p.count; ++n) depth += p.terms[n].depth;
    return depth;
}

// The row before which all rows from `row` on have the same terms.
inline int64_t border_after(const Sum& p, int64_t row) {
    int64_t border = p.M;
    for (int64_t n = 0; n < p.count; ++n) {
        const int64_t bounds[] = {p.terms[n].first, p.terms[n].end};
        for (int64_t at : bounds)
            if (at > row && at < border) border = at;
    }
    return border;
}

}  // namespace
