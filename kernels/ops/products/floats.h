// Sums of products of single values in fp32, by fused multiply-add.
//
// A panel holds some columns of the b of all terms as fp32, `wide` of them side by side: 64, of which 6 rows of sums fill
// the registers, or 16 where there are half as many of half the size. A line of 64 is 24 multiply-adds for 10 loads, one
// of 16 is 12 for 8, and flows fast enough from the second cache. Rows of a
// in bf16 are made fp32 a tile at a time, for all columns of the panel: some columns more where the depth leaves room.
// NF4 is rounded as `dequantize` rounds it to the dtype of a, and so is b in fp32; a product of two bf16 is exact.
#pragma once
#include "sums.h"

#if defined(__AVX2__)

namespace {
namespace floats {

using simd::LANES;
using simd::Vec;

constexpr int64_t CHUNK = 64;   // values of a row that are looked up together
#if defined(__AVX512F__)
constexpr int VECTORS = 4;          // of a line at most
constexpr int64_t TALL = 12;        // rows of a tile that is one vector wide
constexpr int64_t DEPTH = 384;      // values of each row of a that are made fp32 at a time, which the nearest cache keeps
constexpr int64_t PANEL = 1 << 17;  // words that panels of more columns than CHUNK may fill; cpu.py has the larger
constexpr int64_t BLOCK = 1 << 18;  // words of a part of a panel that is too large for the second cache
#else
constexpr int VECTORS = 2;
constexpr int64_t TALL = 6;
constexpr int64_t DEPTH = 192;
constexpr int64_t PANEL = 1 << 16;  // a half of a second cache of 512 KB
constexpr int64_t BLOCK = 1 << 16;
#endif
constexpr int64_t WHOLE = BLOCK * 3 / 2;  // words of a panel that is not too large
constexpr int64_t ROOM = 24;              // tiles whose sums wait for the next part
constexpr int64_t AHEAD = 8;  // lines of a panel between the one that is fetched and the one that is multiplied

// The CHUNK values of a packed row that begin with a block at `column`. R is the dtype of a.
template <class R>
void decode_chunk(const Matrix& m, int64_t row, int64_t column, float* out) {
    const PackedNF4& w = *m.packed;
    const int64_t at = row * m.stride + column;
    Decoder<float, R>(w).from(w.codes + at / 2, scale_of(w, at / w.block), CHUNK, out);
}

// A vector of a dense row, of which `count` values or more are there, and zeros.
template <class R>
inline Vec dense_values(const Matrix& m, int64_t row, int64_t column, int64_t count) {
    const auto loaded = [&](auto part) {
        const int64_t at = row * m.stride + column;
        if (m.kind == 0) return simd::load(static_cast<const uint16_t*>(m.data) + at, part);
        return simd::rounded<R>(simd::fill(m.factor) * simd::load(static_cast<const float*>(m.data) + at, part));
    };
    if (count <= 0) return simd::fill(0);
    return count < LANES ? loaded(simd::First{count}) : loaded(simd::All{});
}

// Where a value of a panel lies: `wide` columns side by side, line by line along the depth of all terms, then the next.
struct Panel {
    float* data;
    int64_t wide, depth;
    float* line(int64_t k, int64_t column) const {
        return data + column / wide * wide * depth + k * wide + column % wide;
    }
};

// A part of the depth of a term, and the line of a panel that it begins at.
struct Piece {
    int64_t k, end, line;
};

// Columns [first, first + columns) of b to the lines of a piece, zeros to the column `lanes`.
template <class R>
void pack_turned(const Term& t, int64_t first, int64_t columns, int64_t lanes, const Piece& piece, const Panel& panel) {
    const bool packed = t.b.kind == 2;
    alignas(64) float values[LANES][CHUNK];
    for (int64_t column = 0; column < lanes; column += LANES)
        for (int64_t k = piece.k; k < piece.end; k += CHUNK) {
            const int64_t rows = simd::smaller(LANES, columns - column);  // of b; none, too
            for (int64_t i = 0; packed && i < rows; ++i) decode_chunk<R>(t.b, first + column + i, k, values[i]);
            float* to = panel.line(piece.line + k - piece.k, column);
            for (int64_t j = 0; j < CHUNK && k + j < piece.end; j += LANES) {
                Vec square[LANES];
                for (int64_t i = 0; i < LANES; ++i) {
                    if (i >= rows)
                        square[i] = simd::fill(0);
                    else if (packed)
                        square[i] = simd::load(values[i] + j);
                    else
                        square[i] = dense_values<R>(t.b, first + column + i, k + j, t.b_depth - k - j);
                }
                simd::transpose(square);
                const int64_t lines = simd::smaller(LANES, piece.end - k - j);
                for (int64_t i = 0; i < lines; ++i, to += panel.wide) simd::store(square[i], to);
            }
        }
}

template <class R>
void pack_lines(const Term& t, int64_t first, int64_t columns, int64_t lanes, const Piece& piece, const Panel& panel) {
    const bool packed = t.b.kind == 2;
    alignas(64) float values[CHUNK];
    for (int64_t column = 0; column < lanes; column += CHUNK) {
        const int64_t vectors = simd::smaller(CHUNK, lanes - column) / LANES;
        float* to[CHUNK / LANES];
        for (int64_t j = 0; j < vectors; ++j) to[j] = panel.line(piece.line, column + j * LANES);
        for (int64_t k = piece.k; k < piece.end; ++k) {
            const int64_t there = k < t.b_depth ? columns - column : 0;
            if (packed && there > 0) decode_chunk<R>(t.b, k, first + column, values);
            for (int64_t j = 0; j < vectors; ++j) {
                const int64_t at = j * LANES;
                const Vec v = packed && there > 0 ? simd::load(values + at)
                                                  : dense_values<R>(t.b, k, first + column + at, there - at);
                simd::store(v, to[j] + (k - piece.k) * panel.wide);
            }
        }
    }
}

template <class R>
void pack(const Term& t, int64_t first, int64_t columns, int64_t lanes, const Piece& piece, const Panel& panel) {
    t.turned ? pack_turned<R>(t, first, columns, lanes, piece, panel)
             : pack_lines<R>(t, first, columns, lanes, piece, panel);
}

// Adds the products of R rows of a, `stride` apart, and of `depth` lines of Z vectors, b, to the sums in rows of `out`.
// They are added up by themselves first: sums of up to DEPTH values, and then of these sums, round less than one long sum.
template <int R, int Z>
void tile(const float* a, int64_t stride, const float* b, int64_t depth, float* out, int64_t apart) {
    Vec sums[R][Z];
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) sums[i][z] = simd::fill(0);
    for (int64_t k = 0; k < depth; ++k, b += Z * LANES) {
        Vec line[Z];
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) line[z] = simd::load(b + LANES * z);
#pragma GCC unroll 4
        for (int z = 0; z < Z * LANES; z += 16) __builtin_prefetch(b + AHEAD * Z * LANES + z);
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) {
            const Vec value = simd::fill(a[i * stride + k]);
#pragma GCC unroll 4
            for (int z = 0; z < Z; ++z) sums[i][z] = simd::madd(value, line[z], sums[i][z]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) {
            float* its = out + i * apart + LANES * z;
            simd::store(simd::load(its) + sums[i][z], its);
        }
}

// Writes the sums, `count` rows that lie `apart`, to rows from `row` on and to columns from `first` on.
template <class T>
void finish(const Sum& p, const float* sums, int64_t apart, int64_t row, int64_t count, int64_t first, int64_t columns) {
    const Vec scale = simd::fill(p.scale);
    T* out = p.out ? static_cast<T*>(p.out) + row * p.out_stride + first : nullptr;
    simd::vectors(columns, [&](int64_t i, auto part) {
        const Vec bias = p.bias ? simd::load(p.bias + first + i, part) : simd::fill(0);
        Vec rows[LANES] = {};
        for (int64_t n = 0; n < count; ++n) {
            rows[n] = simd::madd(simd::load(sums + n * apart + i), scale, bias);
            if (out) simd::store(rows[n], out + n * p.out_stride + i, part);
        }
        if (!p.turned) return;
        simd::transpose(rows);
        T* to = static_cast<T*>(p.turned) + (first + i) * p.turned_stride + row;
        for (int64_t n = 0; n < LANES && i + n < columns; ++n)
            simd::store(rows[n], to + n * p.turned_stride, simd::First{count});
    });
}

}  // namespace floats

struct Floats {
    const Sum& p;
    const bool singles;
    const int64_t fewest = (p.N + floats::LANES - 1) / floats::LANES;
    const int64_t vectors = fewest > floats::VECTORS / 2 ? floats::VECTORS : fewest;
    const int64_t wide = vectors * floats::LANES, high = vectors == 1 ? floats::TALL : 6, depth = depth_of(p);
    const int64_t lanes;         // columns of a panel, what there is room for
    const int64_t lines, parts;  // lines of a panel, and into how many parts they divide the depth
    const int64_t room = parts == 1 ? 1 : floats::ROOM;  // tiles
    float* const sums;           // [room, high, lanes]
    float* const rows;           // [high, DEPTH]
    const floats::Panel panel;

    Floats(const Sum& sum, const Sums& all, uint32_t* space)
        : p(sum), singles(all.singles), lanes(columns_of_panel(all)),
          lines(lanes * depth <= floats::WHOLE ? depth : floats::BLOCK / lanes), parts(count_parts()),
          sums(reinterpret_cast<float*>(space)), rows(sums + room * high * lanes),
          panel{rows + high * floats::DEPTH, wide, lines} {}

    int64_t columns_of_panel(const Sums& all) const {
        if (p.N <= wide) return wide;
        const int64_t chunks = (p.N + floats::CHUNK - 1) / floats::CHUNK;
        const int64_t space = simd::smaller(all.size, floats::PANEL);
        const int64_t fit = (space - high * floats::DEPTH) / (floats::CHUNK * (high + depth));
        const int64_t share = (chunks + all.threads - 1) / all.threads;
        const int64_t most = simd::smaller(fit, share);
        return floats::CHUNK * (most > 1 ? most : 1);
    }

    // Calls f(term, piece) for what lies in a part of the depth: DEPTH values or fewer at a time, in order. Returns the
    // number of parts up to there.
    template <class F>
    int64_t pieces(int64_t part, F f) const {
        int64_t now = 0, line = 0;
        for (int64_t n = 0; n < p.count && now <= part; ++n)
            for (int64_t k = 0; k < p.terms[n].depth; k += floats::DEPTH) {
                const int64_t end = simd::smaller(k + floats::DEPTH, p.terms[n].depth);
                if (line + end - k > lines) ++now, line = 0;
                if (now > part) break;
                if (now == part) f(p.terms[n], floats::Piece{k, end, line});
                line += end - k;
            }
        return now + 1;
    }

    int64_t count_parts() const {
        return lines == depth ? 1 : pieces(depth, [](const Term&, const floats::Piece&) {});
    }

    // Lays out a part of columns [first, first + columns), at most `lanes`.
    void pack(int64_t first, int64_t columns, int64_t part) {
        pieces(part, [&](const Term& t, const floats::Piece& piece) {
            singles ? floats::pack<float>(t, first, columns, lanes, piece, panel)
                    : floats::pack<uint16_t>(t, first, columns, lanes, piece, panel);
        });
    }

    // Adds up a part of these columns of rows [row, row + count), at most `high`, and writes them after the last one. The
    // sums wait at a place among `room` until then.
    void add_up(int64_t place, int64_t part, int64_t row, int64_t count, int64_t first, int64_t columns) {
        float* const its = sums + place * high * lanes;
        singles ? add_up<float>(its, part, row, count, first, columns)
                : add_up<uint16_t>(its, part, row, count, first, columns);
    }

  private:
    template <class T>
    void add_up(float* its, int64_t part, int64_t row, int64_t count, int64_t first, int64_t columns) {
        if (part == 0) std::memset(its, 0, static_cast<size_t>(count * lanes) * sizeof(float));
        pieces(part, [&](const Term& t, const floats::Piece& piece) {
            if (!t.has(row)) return;
            const int64_t some = piece.end - piece.k;
            const Rows a = rows_of(t.from<T>(row) + piece.k, t.a_stride, count, some);
            for (int64_t column = 0; column < columns; column += wide)
                multiply(count, a, panel.line(piece.line, column), some, its + column);
        });
        if (part < parts - 1) return;
        p.wide ? floats::finish<float>(p, its, lanes, row, count, first, columns)
               : floats::finish<uint16_t>(p, its, lanes, row, count, first, columns);
    }

    struct Rows {
        const float* data;
        int64_t apart;
    };

    // `count` rows of `some` values in fp32: those of a that are fp32 are read where they lie.
    template <class T>
    Rows rows_of(const T* a, int64_t apart, int64_t count, int64_t some) {
        if constexpr (sizeof(T) == sizeof(float)) {
            return {a, apart};
        } else {
            for (int64_t i = 0; i < count; ++i) {
                float* out = rows + i * floats::DEPTH;
                const T* from = a + i * apart;
                simd::vectors(some, [=](int64_t k, auto part) { simd::store(simd::load(from + k, part), out + k, part); });
            }
            return {rows, floats::DEPTH};
        }
    }

    void multiply(int64_t count, Rows a, const float* b, int64_t some, float* out) {
        if (vectors == 1) return multiply<floats::TALL, 1>(count, a, b, some, out);
        if (vectors == 2) return multiply<6, 2>(count, a, b, some, out);
        multiply<6, floats::VECTORS>(count, a, b, some, out);
    }
    template <int R, int Z>
    void multiply(int64_t count, Rows a, const float* b, int64_t some, float* out) {
        if (count == R) return floats::tile<R, Z>(a.data, a.apart, b, some, out, lanes);
        if constexpr (R > 1) multiply<R - 1, Z>(count, a, b, some, out);
    }
};

}  // namespace

#endif
