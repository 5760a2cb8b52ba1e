// Causal or masked attention on the CPU, forward and backward, in blocks of queries and keys: no T x S scores exist.
//
// A unit of work is a block of a document's tokens and one key head. Its rows are the tokens' query heads that read
// that key head, token by token; q, and in backward dy, are widened to fp32 and also laid out by columns. They stay in
// the cache while the blocks of KEYS keys that any of them sees go by. A strip of STRIP rows meets a block of keys:
//
//     forward    s = k q'   p = e^(s - base of the row)   o += p' v    and at the end y = o / sum p, lse = ln sum e^s
//     backward   s = k q'   p = e^(s - lse)   dp = v dy'   ds = p (dp - dy . y) scale   dq += ds' k
//                then, with all rows of the unit, dv += p dy and dk += ds q
//
// with s scaled, and capped where there is a soft cap c: s = c tanh(s / c), whose ds has the factor 1 - (s / c)^2.
// s, p, dp and ds have a line per key and a column per row, so that eight rows are softened at a time and nothing is
// summed across a vector. The base of a row is its first largest score, raised where a score lies SLACK above it.
//
// Every product is made of tiles of 6 x 16 sums that stay in registers. What nobody sees is left out of it: of scores
// tiles, and of sums over keys, or rows, those before the first and behind the last that is seen by one of the six.
//
// Threads take the units from one list, the longest first. A unit owns its rows of y, lse and dq. The units of one
// document and key head all add to dk and dv, block of keys by block of keys, and for each they wait for their turn:
// that of the last tokens comes first, as it does in the list, so that whoever is waited for is at work or done. The
// order of every sum is thus fixed by the document alone, and neither the number of threads nor what else is in the
// batch changes a bit.
#include "simd.h"

#include <math.h>
#include <sched.h>

namespace {

using namespace simd;

constexpr int64_t TILE = 6;         // rows of a tile of sums
constexpr int64_t STRIP = 48;       // rows of a unit that meet a block of keys at a time: whole tiles, both ways
constexpr int64_t KEYS = 64;        // of a block
constexpr int64_t MOST_ROWS = 192;  // of a unit, if its tokens can be so few
constexpr int64_t CACHED = 18432;   // floats of q that a unit has, likewise
constexpr float LOWEST = -3e38f;    // a base while nothing has been seen
constexpr float SLACK = 16;         // e^16 times as many as there are keys is far below the largest float

inline int64_t bigger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }
inline int64_t whole(int64_t n) { return tiles(n, 16) * 16; }

// Floats from one row of n to the next: an odd number of cache lines, so that a column of them does not fall on the
// same few places of the cache.
inline int64_t width(int64_t n) { return (tiles(n, 16) | 1) * 16; }

// ---- what Python hands over (cpu.py has the same layouts) ----------------------------------------------------------

template <class T>
struct View {  // [B, T or S, heads, D], dense in D
    T* data;
    int64_t batch, token, head;
    T* at(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

struct Block {
    int64_t document, batch;  // batch: the row of q, k and v that the document lies in
    int64_t start, length;    // of the document
    int64_t number;           // of the block in the document
};

template <class T>
struct Attention {
    View<const T> q, k, v, dy;
    View<T> y, dq;
    float *lse, *dk, *dv;  // [B, Hq, T]; [B, S, Hk, whole(D)], zero at first
    const uint8_t* mask;   // bool [B or 1, T, S], null: causal
    const Block* blocks;
    uint8_t* seen;   // [documents, blocks of one, blocks of keys], for a mask
    int32_t* turns;  // [documents, Hk, blocks of keys]: how many units have added to dk and dv; zero at first
    float* space;    // [slots, size]
    int64_t count, mask_batch, mask_token, slots, size;
    int64_t T_, S, Hq, Hk, D, tokens, window;  // tokens: of a block; window: the positions seen, own included
    float scale, softcap;                      // softcap 0: none
};

// ---- products ------------------------------------------------------------------------------------------------------

// c [M, 16] = or += a b with a [M, depth] (or as it lies, a' [depth, M]) and b [depth, 16].
template <int M, bool TRANSPOSED, bool ADD>
void tile(const float* a, int64_t a_apart, const float* b, int64_t b_apart, int64_t depth, float* c, int64_t c_apart) {
    Vec sums[M][2];
#pragma GCC unroll 6  // lest the sums live in memory
    for (int i = 0; i < M; ++i) sums[i][0] = sums[i][1] = fill(0);
    for (int64_t k = 0; k < depth; ++k) {
        const Vec low = load(b), high = load(b + 8);
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
            const Vec factor = fill(a[TRANSPOSED ? i : i * a_apart]);
            sums[i][0] = madd(factor, low, sums[i][0]);
            sums[i][1] = madd(factor, high, sums[i][1]);
        }
        a += TRANSPOSED ? a_apart : 1;
        b += b_apart;
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i, c += c_apart) {
        store(ADD ? load(c) + sums[i][0] : sums[i][0], c);
        store(ADD ? load(c + 8) + sums[i][1] : sums[i][1], c + 8);
    }
}

// The same for `rows` <= TILE and any number of columns that is a multiple of 16.
template <bool TRANSPOSED, bool ADD>
void multiply(int64_t rows, const float* a, int64_t a_apart, const float* b, int64_t b_apart, int64_t depth, float* c,
              int64_t c_apart, int64_t columns) {
    for (int64_t j = 0; j < columns; j += 16) {
        switch (rows) {
            case 6: tile<6, TRANSPOSED, ADD>(a, a_apart, b + j, b_apart, depth, c + j, c_apart); break;
            case 5: tile<5, TRANSPOSED, ADD>(a, a_apart, b + j, b_apart, depth, c + j, c_apart); break;
            case 4: tile<4, TRANSPOSED, ADD>(a, a_apart, b + j, b_apart, depth, c + j, c_apart); break;
            case 3: tile<3, TRANSPOSED, ADD>(a, a_apart, b + j, b_apart, depth, c + j, c_apart); break;
            case 2: tile<2, TRANSPOSED, ADD>(a, a_apart, b + j, b_apart, depth, c + j, c_apart); break;
            default: tile<1, TRANSPOSED, ADD>(a, a_apart, b + j, b_apart, depth, c + j, c_apart);
        }
    }
}

// Eight vectors as the rows of a matrix become its columns.
inline void transpose(Vec (&a)[8]) {
#if defined(__AVX2__)
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(a[i].v, a[i + 1].v);
        pairs[i + 1] = _mm256_unpackhi_ps(a[i].v, a[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    }
    for (int i = 0; i < 4; ++i) {
        a[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
        a[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
    }
#else
    for (int i = 0; i < 8; ++i) {
        for (int j = 0; j < i; ++j) {
            const float other = a[i].v[j];
            a[i].v[j] = a[j].v[i];
            a[j].v[i] = other;
        }
    }
#endif
}

// ---- one unit ------------------------------------------------------------------------------------------------------

struct Range {
    int64_t first, last;  // none before first, none from last on
};

template <class T>
struct Unit {
    const Attention<T>& a;
    const int64_t D, G, most, wide, apart;  // most: rows; floats from row to row, and from column to column
    const float factor;  // that scores are still to be multiplied by when they have been capped, or not
    float *k, *v;        // a block of keys: [KEYS, wide]
    float *q, *dy;       // [rows, wide], in backward alone
    float *qt, *dyt;     // the same by columns: [D, apart]; dyt in backward alone
    float* sums;         // [rows, wide]: o or dq
    float *p, *ds;       // [KEYS, apart]; in forward p alone, [KEYS, STRIP]
    float *base, *rest;  // [rows]: the base or the lse; the sum of p, or -scale dy . y

    Block block;
    int64_t head, first, count, rows, keys;  // first: token of the document; keys: of the document
    int64_t j, start, size;                  // a block of keys

    Unit(const Attention<T>& attention, float* space, bool backward)
        : a(attention), D(a.D), G(a.Hq / a.Hk), most(a.tokens * G), wide(width(D)), apart(width(most)),
          factor(a.softcap == 0 ? a.scale : 1) {
        auto take = [&](int64_t floats) {
            space += floats;
            return space - floats;
        };
        k = take(KEYS * wide), v = take(KEYS * wide);
        qt = take(whole(D) * apart), sums = take(most * wide);
        base = take(apart), rest = take(apart);
        if (!backward) {
            p = take(KEYS * STRIP);
            return;
        }
        p = take(KEYS * apart), ds = take(KEYS * apart);
        dyt = take(whole(D) * apart), q = take(most * wide), dy = take(most * wide);
    }

    static int64_t floats(int64_t D, int64_t most) {
        const int64_t wide = width(D), apart = width(most);
        return 2 * KEYS * wide + 2 * whole(D) * apart + 3 * most * wide + 2 * apart + 2 * KEYS * bigger(apart, STRIP);
    }

    void set(int64_t u) {
        block = a.blocks[u / a.Hk];
        head = u % a.Hk;
        first = block.number * a.tokens;
        count = smaller(a.tokens, block.length - first);
        rows = count * G;
        keys = a.mask ? a.S : block.length;
    }

    void set_keys(int64_t number) {
        j = number;
        start = j * KEYS;
        size = smaller(KEYS, keys - start);
    }

    int64_t token(int64_t row) const { return block.start + first + row / G; }
    int64_t query_head(int64_t row) const { return head * G + row % G; }
    template <class X>
    X* of(const View<X>& x, int64_t row) const {
        return x.at(block.batch, token(row), query_head(row));
    }
    const T* of_key(const View<const T>& x, int64_t c) const { return x.at(block.batch, block.start + start + c, head); }
    float& lse(int64_t row) const { return a.lse[(block.batch * a.Hq + query_head(row)) * a.T_ + token(row)]; }

    // ---- who sees what ----

    const uint8_t* mask(int64_t row) const {
        return a.mask + block.batch * a.mask_batch + token(row) * a.mask_token + start;
    }

    // Whether any token of the document's block `number` sees a key of the current block of keys.
    bool sees(int64_t number) const {
        if (a.mask) {
            const int64_t blocks = tiles(a.T_, a.tokens);
            return a.seen[(block.document * blocks + number) * tiles(a.S, KEYS) + j];
        }
        const int64_t earliest = number * a.tokens, latest = smaller(earliest + a.tokens, block.length) - 1;
        return start <= latest && start + size > earliest - a.window + 1;
    }

    // The keys of the block that one of the rows [row, end) sees.
    Range keys_of(int64_t row, int64_t end) const {
        Range r = {0, size};
        if (!a.mask) {
            r.first = bigger(0, first + row / G - a.window + 1 - start);
            r.last = bigger(r.first, smaller(size, first + (end - 1) / G + 1 - start));
            return r;
        }
        auto any = [&](int64_t c) {
            for (int64_t i = row; i < end; i += G - i % G)
                if (mask(i)[c]) return true;
            return false;
        };
        while (r.last > 0 && !any(r.last - 1)) --r.last;
        while (r.first < r.last && !any(r.first)) ++r.first;
        return r;
    }

    // The rows that see one of the keys [c, end) of the block; with a mask, all.
    Range rows_of(int64_t c, int64_t end) const {
        if (a.mask) return {0, rows};
        const int64_t from = bigger(0, start + c - first), to = smaller(count, start + end - 1 + a.window - first);
        return {from * G, bigger(from, to) * G};
    }

    // ---- moving ----

    // Brings the n-th of `parts` parts of the next block of keys to the cache.
    void fetch(int64_t n, int64_t parts) const {
        const int64_t share = tiles(KEYS, parts), bytes = D * static_cast<int64_t>(sizeof(T));
        for (int64_t c = KEYS + n * share; c < smaller(KEYS + (n + 1) * share, keys - start); ++c) {
            const char* const pair[] = {reinterpret_cast<const char*>(of_key(a.k, c)),
                                        reinterpret_cast<const char*>(of_key(a.v, c))};
            for (const char* line : pair)
                for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
        }
    }

    void widen_row(const T* x, float* to) const {  // zeros behind D
        vectors(D, [&](int64_t i, auto some) { store(load(x + i, some), to + i); });
        for (int64_t i = tiles(D, 8) * 8; i < whole(D); i += 8) store(fill(0), to + i);
    }

    void load_keys() const {
        for (int64_t c = 0; c < size; ++c) {
            widen_row(of_key(a.k, c), k + c * wide);
            widen_row(of_key(a.v, c), v + c * wide);
        }
    }

    // Zeros behind the last row
    void load_columns(const View<const T>& x, float* to) const {
        for (int64_t row = 0; row < whole(rows); row += 8) {
            const T* lines[8];
            for (int64_t n = 0; n < 8; ++n) lines[n] = row + n < rows ? of(x, row + n) : nullptr;
            vectors(D, [&](int64_t i, auto some) {
                Vec square[8];
                for (int64_t n = 0; n < 8; ++n) square[n] = lines[n] ? load(lines[n] + i, some) : fill(0);
                transpose(square);
                for (int64_t n = 0; n < 8; ++n) store(square[n], to + (i + n) * apart + row);
            });
        }
    }

    void keep(const float* row, float by, T* to) const {
        const Vec times = fill(by);
        vectors(D, [&](int64_t i, auto some) { store(load(row + i) * times, to + i, some); });
    }

    // ---- scores --------------------------------------------------------------------------------------------------

    // out [KEYS, .] = x y' for the keys that r says and the rows [row, end), but `otherwise` where a tile sees nothing
    void multiply_strip(const Range& r, int64_t row, int64_t end, const float* x, const float* y, float otherwise,
                        float* out, int64_t out_apart) const {
        const int64_t columns = whole(end - row);
        for (int64_t c = r.first; c < r.last; c += TILE) {
            const int64_t m = smaller(TILE, r.last - c);
            const Range seen = rows_of(c, c + m);
            const int64_t low = smaller(columns, bigger(0, seen.first - row) / 16 * 16);
            const int64_t high = bigger(low, smaller(columns, whole(bigger(0, seen.last - row))));
            float* to = out + c * out_apart;
            multiply<false, false>(m, x + c * wide, wide, y + row + low, apart, D, to + low, out_apart, high - low);
            for (int64_t i = 0; i < m; ++i, to += out_apart) {
                for (int64_t n = 0; n < low; n += 8) store(fill(otherwise), to + n);
                for (int64_t n = high; n < columns; n += 8) store(fill(otherwise), to + n);
            }
        }
    }

    // Products become scores, left to be scaled unless they are capped here; what is not seen: -inf.
    void score(const Range& r, int64_t row, int64_t end, float* s, int64_t s_apart) const {
        const int64_t columns = whole(end - row);
        const Vec never = fill(-HUGE_VALF);
        if (a.softcap != 0) {
            const Vec cap = fill(a.softcap), by = fill(a.scale / a.softcap);
            for (int64_t c = r.first; c < r.last; ++c) {
                float* line = s + c * s_apart;
                for (int64_t n = 0; n < columns; n += 8) store(cap * tanh(load(line + n) * by), line + n);
            }
        }
        if (a.mask) {
            for (int64_t i = row; i < end; ++i) {
                const uint8_t* m = mask(i);
                for (int64_t c = r.first; c < r.last; ++c)
                    if (!m[c]) s[c * s_apart + i - row] = -HUGE_VALF;
            }
            return;
        }
        const float numbers[] = {0, 1, 2, 3, 4, 5, 6, 7};
        for (int64_t c = r.first; c < r.last; ++c) {
            const Range seen = rows_of(c, c + 1);
            if (seen.first <= row && seen.last >= end) continue;
            const Vec from = fill(static_cast<float>(seen.first - row)), to = fill(static_cast<float>(seen.last - row));
            float* line = s + c * s_apart;
            for (int64_t n = 0; n < columns; n += 8) {
                const Vec at = load(numbers) + fill(static_cast<float>(n) + 0.5f);
                store(by_sign(smaller(at - from, to - at), never, load(line + n)), line + n);
            }
        }
    }

    // ---- forward -------------------------------------------------------------------------------------------------

    void forward() {
        load_columns(a.q, qt);
        for (int64_t i = 0; i < rows * wide; i += 8) store(fill(0), sums + i);
        for (int64_t i = 0; i < whole(rows); i += 8) store(fill(LOWEST), base + i), store(fill(0), rest + i);
        for (int64_t n = 0; n * KEYS < keys; ++n) {
            set_keys(n);
            if (!sees(block.number)) continue;
            load_keys();
            for (int64_t row = 0; row < rows; row += STRIP) {
                fetch(row / STRIP, tiles(rows, STRIP));
                attend(row, smaller(row + STRIP, rows));
            }
        }
        for (int64_t i = 0; i < rows; ++i) {
            const float sum = rest[i];  // 0: sees nothing
            keep(sums + i * wide, sum == 0 ? 0 : 1 / sum, of(a.y, i));
            lse(i) = sum == 0 ? HUGE_VALF : base[i] + logf(sum);
        }
    }

    void attend(int64_t row, int64_t end) {
        const Range r = keys_of(row, end);
        if (r.first == r.last) return;
        multiply_strip(r, row, end, k, qt, -HUGE_VALF, p, STRIP);
        score(r, row, end, p, STRIP);
        for (int64_t i = row; i < end; i += 8) soften(r, i, p + i - row);
        add_to_rows(r, row, end, p, STRIP, v);
    }

    // Scores of eight rows -> exponentials relative to their bases
    void soften(const Range& r, int64_t row, float* s) {
        Vec highest = fill(-HUGE_VALF);
        for (int64_t c = r.first; c < r.last; ++c) highest = larger(load(s + c * STRIP), highest);
        const Vec by = fill(factor);
        highest = highest * by;
        if (largest(highest - load(base + row)) > SLACK) raise(row, highest);
        const Vec below = -load(base + row);
        Vec sum = load(rest + row);
        for (int64_t c = r.first; c < r.last; ++c) {
            const Vec e = exponential(madd(load(s + c * STRIP), by, below));
            store(e, s + c * STRIP);
            sum = sum + e;
        }
        store(sum, rest + row);
    }

    // Brings the bases of eight rows to `highest` where they lie lower, and with them what was summed.
    void raise(int64_t row, Vec highest) {
        float shrink[8];
        const Vec before = load(base + row), now = larger(highest, before);
        const Vec by = exponential(before - now);
        store(by, shrink);
        store(now, base + row);
        store(load(rest + row) * by, rest + row);
        for (int64_t i = row; i < smaller(row + 8, rows); ++i)
            for (int64_t d = 0; d < D; d += 8) store(load(sums + i * wide + d) * fill(shrink[i - row]), sums + i * wide + d);
    }

    // sums += weights' x for the rows [row, end)
    void add_to_rows(const Range& r, int64_t row, int64_t end, const float* weights, int64_t weights_apart,
                     const float* x) const {
        for (int64_t i = row; i < end; i += TILE) {
            const int64_t m = smaller(TILE, end - i);
            const Range seen = a.mask ? r : keys_of(i, i + m);
            multiply<true, true>(m, weights + seen.first * weights_apart + i - row, weights_apart,
                                 x + seen.first * wide, wide, seen.last - seen.first, sums + i * wide, wide, whole(D));
        }
    }

    // ---- backward ------------------------------------------------------------------------------------------------

    void backward() {
        load_columns(a.q, qt);
        load_columns(a.dy, dyt);
        for (int64_t i = 0; i < rows * wide; i += 8) store(fill(0), sums + i);
        for (int64_t i = 0; i < rows; ++i) {
            widen_row(of(a.q, i), q + i * wide);
            widen_row(of(a.dy, i), dy + i * wide);
            const T* y = of(a.y, i);
            rest[i] = -a.scale * sum(running(D, fill(0), [&](int64_t d, auto some, Vec before) {
                return madd(load(dy + i * wide + d), load(y + d, some), before);
            }));
            base[i] = lse(i);
        }
        for (int64_t i = rows; i < whole(rows); ++i) base[i] = HUGE_VALF, rest[i] = 0;
        for (int64_t n = 0; n * KEYS < keys; ++n) {
            set_keys(n);
            if (!sees(block.number)) continue;
            load_keys();
            for (int64_t row = 0; row < rows; row += STRIP) {
                fetch(row / STRIP, tiles(rows, STRIP));
                differentiate(row, smaller(row + STRIP, rows));
            }
            add_to_keys();
        }
        for (int64_t i = 0; i < rows; ++i) keep(sums + i * wide, 1, of(a.dq, i));
    }

    // p and ds of the rows [row, end), in all lines; dq += ds' k
    void differentiate(int64_t row, int64_t end) {
        const Range r = keys_of(row, end);
        float *s = p + row, *d = ds + row;
        const int64_t columns = whole(end - row);
        for (int64_t c = 0; c < size; ++c) {
            if (c == r.first && r.first < r.last) c = r.last;
            if (c == size) break;
            for (int64_t n = 0; n < columns; n += 8)
                store(fill(0), s + c * apart + n), store(fill(0), d + c * apart + n);
        }
        if (r.first == r.last) return;
        multiply_strip(r, row, end, k, qt, -HUGE_VALF, s, apart);
        multiply_strip(r, row, end, v, dyt, 0, d, apart);
        score(r, row, end, s, apart);
        for (int64_t n = 0; n < columns; n += 8) slope(r, row + n, s + n, d + n);
        add_to_rows(r, row, end, d, apart, k);
    }

    // Of eight rows: scores -> p, dp -> ds
    void slope(const Range& r, int64_t row, float* s, float* d) const {
        const Vec scale = fill(a.scale), mean = load(rest + row), by = fill(factor), below = -load(base + row);
        if (a.softcap != 0) {
            const Vec inverse = fill(1 / a.softcap), one = fill(1);
            for (int64_t c = r.first; c < r.last; ++c) {
                const Vec x = load(s + c * apart), t = larger(-one, x * inverse);  // -1 for what is not seen
                const Vec e = exponential(x + below);
                store(e, s + c * apart);
                store(e * (one - t * t) * madd(load(d + c * apart), scale, mean), d + c * apart);
            }
            return;
        }
        for (int64_t c = r.first; c < r.last; ++c) {
            const Vec e = exponential(madd(load(s + c * apart), by, below));
            store(e, s + c * apart);
            store(e * madd(load(d + c * apart), scale, mean), d + c * apart);
        }
    }

    // dv += p dy, dk += ds q, when the units before have done so
    void add_to_keys() const {
        int32_t* turn = a.turns + (block.document * a.Hk + head) * tiles(a.S, KEYS) + j;
        int32_t mine = 0;
        for (int64_t n = block.number + 1; n * a.tokens < block.length; ++n) mine += sees(n);
        for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; ++spins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 4000) sched_yield();  // the one waited for may need this processor
        }
        const int64_t padded = whole(D), line = a.Hk * padded;
        const int64_t place = ((block.batch * a.S + block.start + start) * a.Hk + head) * padded;
        for (int64_t d = 0; d < padded; d += 16) {
            for (int64_t c = 0; c < size; c += TILE) {
                const int64_t m = smaller(TILE, size - c);
                const Range seen = rows_of(c, c + m);
                const int64_t at = c * apart + seen.first, from = seen.first * wide + d, to = place + c * line + d;
                multiply<false, true>(m, p + at, apart, dy + from, wide, seen.last - seen.first, a.dv + to, line, 16);
                multiply<false, true>(m, ds + at, apart, q + from, wide, seen.last - seen.first, a.dk + to, line, 16);
            }
        }
        __atomic_store_n(turn, mine + 1, __ATOMIC_RELEASE);
    }
};

// ---- all units -----------------------------------------------------------------------------------------------------

template <class T>
struct Job {
    const Attention<T>& a;
    bool backward;
    int64_t next;
};

template <class T>
void work(void* data, int64_t slot, int64_t) {
    Job<T>& job = *static_cast<Job<T>*>(data);
    const Attention<T>& a = job.a;
    Unit<T> unit(a, a.space + slot * a.size, job.backward);
    for (;;) {
        const int64_t u = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (u >= a.count * a.Hk) return;
        unit.set(u);
        if (job.backward)
            unit.backward();
        else
            unit.forward();
    }
}

// seen[b, i, j]: whether one of the i-th tokens sees one of the j-th keys
template <class T>
void look(const Attention<T>& a) {
    const int64_t blocks = tiles(a.T_, a.tokens), wide = tiles(a.S, KEYS);
    parallel(a.count, a.tokens * a.S / 16, [&](int64_t from, int64_t to) {
        for (int64_t n = from; n < to; ++n) {
            const Block& block = a.blocks[n];
            uint8_t* seen = a.seen + (block.document * blocks + block.number) * wide;
            std::memset(seen, 0, static_cast<size_t>(wide));
            const int64_t first = block.number * a.tokens, last = smaller(first + a.tokens, a.T_);
            for (int64_t t = first; t < last; ++t) {
                const uint8_t* mask = a.mask + block.batch * a.mask_batch + t * a.mask_token;
                for (int64_t j = 0; j < wide; ++j) {
                    uint8_t any = 0;
                    for (int64_t c = j * KEYS; c < smaller(a.S, (j + 1) * KEYS); ++c) any |= mask[c];
                    seen[j] |= any;
                }
            }
        }
    });
}

template <class T>
void run(const Attention<T>& a, bool backward) {
    if (a.mask) look(a);
    Job<T> job{a, backward, 0};
    lk_parallel_for(a.slots, 1, work<T>, &job);
}

}  // namespace

extern "C" {

// Sizes for heads of D dimensions, `group` query heads to a key head: tokens of a block, keys of a block, and floats
// of one slot of `space`.
void LK_EXPORT(attention_sizes)(int64_t D, int64_t group, int64_t* sizes) {
    sizes[0] = bigger(1, smaller(MOST_ROWS, CACHED / whole(D)) / group);
    sizes[1] = KEYS;
    sizes[2] = Unit<float>::floats(D, sizes[0] * group);
}

void LK_EXPORT(attention_fp32)(const Attention<float>* a) { run(*a, false); }
void LK_EXPORT(attention_bf16)(const Attention<uint16_t>* a) { run(*a, false); }
void LK_EXPORT(attention_backward_fp32)(const Attention<float>* a) { run(*a, true); }
void LK_EXPORT(attention_backward_bf16)(const Attention<uint16_t>* a) { run(*a, true); }

}  // extern "C"
