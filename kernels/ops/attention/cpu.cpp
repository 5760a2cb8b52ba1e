// Causal or masked attention on the CPU, forward and backward, in blocks of queries and keys: no T x S scores exist.
//
// A unit of work is a block of a document's tokens and one key head. Its rows are the tokens' query heads that read
// that key head, token by token; q, and in backward dy, are packed once. They stay in the cache while the blocks of
// KEYS keys that any of them sees go by. A strip of STRIP rows meets a block of keys:
//
//     forward    s = k q'   p = e^(s - base of the row)   o += p' v    and at the end y = o / sum p, lse = ln sum e^s
//     backward   s = k q'   p = e^(s - lse)   dp = v dy'   ds = p (dp - dy . y) scale   dq += ds' k
//                then, with all rows of the unit, dv += p dy and dk += ds q
//
// with s scaled, and capped where there is a soft cap c: s = c tanh(s / c), whose ds has the factor 1 - (s / c)^2.
// s, p, dp and ds have a line per key and a column per row, so that a vector of rows is softened at a time and nothing
// is summed across it. The base of a row is its first largest score, raised where a score lies SLACK above it.
//
// The operands of a product are made of words of 32 bits along what is summed: one fp32, or, where the processor
// multiplies them faster, a pair of bf16 (Single and Pairs below). What a product reads line by line is packed as `lines`,
// [rows, words of D]; what it reads a vector at a time as `words`, [words of rows, D], or as `columns`, [words of D,
// rows]. Of single values lines and words are the same. All sums, and p and ds until they are packed, are fp32.
//
// Every product is made of tiles of sums that stay in registers. What nobody sees is left out of it: of scores tiles,
// and of sums over keys, or rows, the words before the first and after the last that is seen by one of the tile's.
//
// Threads take the units from one list, the longest first. A unit owns its rows of y, lse and dq. The units of one
// document and key head all add to the fp32 sums of dk and dv, block of keys by block of keys, and for each they wait
// for their turn: that of the last tokens comes first, as it does in the list, so that whoever is waited for is at work
// or done. The first one writes the sums, and the last one what they are rounded to. The order of every sum is thus
// fixed by the document alone, and neither the number of threads nor what else is in the batch changes a bit.
#if defined(__AVX512F__)
#define LORAKIT_ANY_LANES
#endif
#include "heads.h"

#include <math.h>
#include <sched.h>

namespace {

using namespace simd;

constexpr int64_t STRIP = 48;       // rows of a unit that meet a block of keys at a time: whole tiles, both ways
constexpr int64_t KEYS = 64;        // of a block
constexpr int64_t MOST_ROWS = 192;  // of a unit, if its tokens can be so few
constexpr int64_t CACHED = 18432;   // floats of q that a unit has, likewise
constexpr float LOWEST = -3e38f;    // a base while nothing has been seen
constexpr float SLACK = 16;         // e^16 times as many as there are keys is far below the largest float

// ---- what Python hands over (cpu.py has the same layouts) ----------------------------------------------------------

struct Block {
    int64_t document, batch;  // batch: the row of q, k and v that the document lies in
    int64_t start, length;    // of the document
    int64_t number;           // of the block in the document
};

template <class T>
struct Attention {
    HeadsView<const T> q, k, v, dy;
    HeadsView<T> y, dq, dk, dv;      // dk and dv of a block of keys that no token sees are left as they are
    float *lse, *dk_sums, *dv_sums;  // [B, Hq, T]; [B, S, Hk, whole(D)]
    const uint8_t* mask;             // bool [B or 1, T, S], null: causal
    const Block* blocks;
    uint8_t* seen;   // [documents, blocks of one, blocks of keys], for a mask
    int32_t* turns;  // [documents, Hk, blocks of keys]: how many units have added to dk and dv; zero at first
    float* space;    // [slots, size]
    int64_t count, mask_batch, mask_token, slots, size;
    int64_t T_, S, Hq, Hk, D, tokens, window;  // tokens: of a block; window: the positions seen, own included
    int64_t pairs;                             // whether products of bf16 are those of pairs
    float scale, softcap;                      // softcap 0: none
};

// ---- operands ------------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
// Two bf16 are a word, the earlier one in its lower half. vdpbf16ps sums their products in fp32; it and the rounding
// take subnormal numbers as 0, which loses at most 1.2e-38 of an operand or a sum.
struct Pairs {
    static constexpr int64_t PAIR = 2;
    static Vec multiply(Vec a, Vec b, Vec sum) {
        return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
    }
    static __m512i round(const Vec (&x)[2]) {  // all of x[0], then all of x[1]
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[1].v, x[0].v));
    }
    static Vec words(const Vec (&x)[2]) {
        const __m512i n = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i order = _mm512_or_si512(n, _mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(16)), 16));
        return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, round(x)))};
    }
    static void line(const uint16_t* x, int64_t D, float* to) {
        for (int64_t i = 0; i < D; i += 32) {
            const __mmask32 inside = D - i < 32 ? (1u << (D - i)) - 1 : ~0u;
            _mm512_storeu_si512(to + i / 2, _mm512_maskz_loadu_epi16(inside, x + i));
        }
    }
    static void put(const Vec (&x)[2], float* to, int64_t apart, int64_t n) {
        float* const place = to + n / 2;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), _mm512_castsi512_si256(round(x)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place + apart), _mm512_extracti64x4_epi64(round(x), 1));
    }
};
#endif

// ---- one unit ------------------------------------------------------------------------------------------------------

struct Range {
    int64_t first, last;  // none before first, none from last on
};

template <class T, class Op>
struct Unit {
    static constexpr int64_t PAIR = Op::PAIR;

    const Attention<T>& a;
    const int64_t D, G, most, wide, apart;  // most: rows; floats from row to row, and from column to column
    const float factor;  // that scores are still to be multiplied by when they have been capped, or not
    float *k, *v;        // a block of keys: lines [KEYS, wide], but v in forward words
    float* q_columns;    // [words of D, apart]
    float* sums;         // [rows, wide]: o or dq
    float *base, *rest;  // [rows]: the base or the lse; the sum of p, or -scale dy . y
    float* s;            // [KEYS, STRIP]; in forward then p in words
    // in backward alone:
    float *k_words, *q_words, *dy_words;  // [words of KEYS, or of rows, wide]
    float* dy_columns;                    // like q's
    float* dp;                            // [KEYS, STRIP], then ds in words
    float *p, *ds;                        // lines [KEYS, apart]

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
        q_columns = take(whole(D) * apart), sums = take(most * wide);
        base = take(apart), rest = take(apart);
        s = take(KEYS * STRIP);
        if (!backward) return;
        k_words = PAIR == 1 ? k : take(KEYS * wide);
        q_words = take(most * wide), dy_words = take(most * wide);
        dy_columns = take(whole(D) * apart);
        dp = take(KEYS * STRIP);
        p = take(KEYS * apart), ds = take(KEYS * apart);
    }

    static int64_t floats(int64_t D, int64_t most) {
        const int64_t wide = width(D), apart = width(most);
        return (3 * KEYS + 3 * most) * wide + 2 * (whole(D) + KEYS + 1) * apart + 2 * KEYS * STRIP;
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
    X* of(const HeadsView<X>& x, int64_t row) const {
        return x.at(block.batch, token(row), query_head(row));
    }
    const T* of_key(const HeadsView<const T>& x, int64_t c) const {
        return x.at(block.batch, block.start + start + c, head);
    }
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

    // Widened to whole words.
    static Range in_words(const Range& r) {
        if (r.first >= r.last) return {0, 0};
        return {r.first / PAIR * PAIR, tiles(r.last, PAIR) * PAIR};
    }

    // The keys of the block that one of the rows [row, end) sees, in words: the last may lie beyond the block.
    Range keys_of(int64_t row, int64_t end) const {
        if (!a.mask)
            return in_words({bigger(0, first + row / G - a.window + 1 - start),
                             smaller(size, first + (end - 1) / G + 1 - start)});
        auto any = [&](int64_t c) {
            for (int64_t i = row; i < end; i += G - i % G)
                if (mask(i)[c]) return true;
            return false;
        };
        Range r = {0, size};
        while (r.last > 0 && !any(r.last - 1)) --r.last;
        while (r.first < r.last && !any(r.first)) ++r.first;
        return in_words(r);
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

    // Lays out `n` rows, at(i) being the i-th, and a row of zeros if they end within a word.
    template <class At>
    void load_lines(int64_t n, At at, float* to) const {
        for (int64_t i = 0; i < n; ++i) Op::line(at(i), D, to + i * wide);
        if (n % PAIR) clear(to + n * wide, whole(D));
    }

    template <class At>
    void load_words(int64_t n, At at, float* to) const {
        for (int64_t i = 0; i < n; i += PAIR, to += wide) {
            const T* lines[PAIR];
            for (int64_t u = 0; u < PAIR; ++u) lines[u] = i + u < n ? at(i + u) : nullptr;
            vectors(D, [&](int64_t d, auto some) {
                Vec x[PAIR];
                for (int64_t u = 0; u < PAIR; ++u) x[u] = lines[u] ? load(lines[u] + d, some) : fill(0);
                store(Op::words(x), to + d);
            });
            const int64_t end = tiles(D, LINE) * LINE;
            clear(to + end, whole(D) - end);
        }
    }

    // Lays out the unit's rows, zeros after the last; by way of `sums`.
    template <class At>
    void load_columns(At at, float* to) const {
        for (int64_t i = 0; i < rows; ++i) Op::line(at(i), D, sums + i * wide);
        for (int64_t row = 0; row < whole(rows); row += LINE) {
            for (int64_t i = 0; i < tiles(D, PAIR); i += LINE) {
                Vec square[LINE];
                for (int64_t n = 0; n < LINE; ++n)
                    square[n] = row + n < rows ? load(sums + (row + n) * wide + i) : fill(0);
                transpose(square);
                for (int64_t n = 0; n < LINE; ++n) store(square[n], to + (i + n) * apart + row);
            }
        }
    }

    void keep(const float* row, float by, T* to) const {
        const Vec times = fill(by);
        vectors(D, [&](int64_t i, auto some) { store(load(row + i) * times, to + i, some); });
    }

    // ---- scores --------------------------------------------------------------------------------------------------

    // out [KEYS, STRIP] = x y' for the keys that r says and the rows [row, end), but `otherwise` where a tile sees
    // nothing
    void multiply_strip(const Range& r, int64_t row, int64_t end, const float* x, const float* y, float otherwise,
                        float* out) const {
        const int64_t columns = whole(end - row);
        for (int64_t c = r.first; c < r.last; c += TILE) {
            const int64_t m = smaller(TILE, r.last - c);
            const Range seen = rows_of(c, c + m);
            const int64_t low = smaller(columns, bigger(0, seen.first - row) / 16 * 16);
            const int64_t high = bigger(low, smaller(columns, whole(bigger(0, seen.last - row))));
            float* to = out + c * STRIP;
            multiply<Op, false>({x + c * wide, wide, y + row + low, apart, tiles(D, PAIR), to + low, STRIP, false}, m,
                                high - low);
            for (int64_t i = 0; i < m; ++i, to += STRIP) {
                for (int64_t n = 0; n < low; n += LINE) store(fill(otherwise), to + n);
                for (int64_t n = high; n < columns; n += LINE) store(fill(otherwise), to + n);
            }
        }
    }

    // Products become scores, left to be scaled unless they are capped here; what is not seen: -inf.
    void score(const Range& r, int64_t row, int64_t end) const {
        const int64_t columns = whole(end - row);
        const Vec never = fill(-HUGE_VALF);
        if (a.softcap != 0) {
            const Vec cap = fill(a.softcap), by = fill(a.scale / a.softcap);
            for (int64_t c = r.first; c < r.last; ++c) {
                float* line = s + c * STRIP;
                for (int64_t n = 0; n < columns; n += LINE) store(cap * tanh(load(line + n) * by), line + n);
            }
        }
        if (a.mask) {
            for (int64_t i = row; i < end; ++i) {
                const uint8_t* m = mask(i);
                for (int64_t c = r.first; c < r.last; ++c)
                    if (c == size || !m[c]) s[c * STRIP + i - row] = -HUGE_VALF;
            }
            return;
        }
        const bool all = rows_of(r.last - 1, r.last).first <= row && rows_of(r.first, r.first + 1).last >= end;
        if (all) return;  // see all
        const float numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int64_t c = r.first; c < r.last; ++c) {
            const Range seen = rows_of(c, c + 1);
            if (seen.first <= row && seen.last >= end) continue;
            const Vec from = fill(static_cast<float>(seen.first - row)), to = fill(static_cast<float>(seen.last - row));
            float* line = s + c * STRIP;
            for (int64_t n = 0; n < columns; n += LINE) {
                const Vec at = load(numbers) + fill(static_cast<float>(n) + 0.5f);
                store(by_sign(smaller(at - from, to - at), never, load(line + n)), line + n);
            }
        }
    }

    // ---- forward -------------------------------------------------------------------------------------------------

    void forward() {
        load_columns([&](int64_t i) { return of(a.q, i); }, q_columns);
        clear(sums, rows * wide);
        for (int64_t i = 0; i < whole(rows); i += LINE) store(fill(LOWEST), base + i), store(fill(0), rest + i);
        for (int64_t n = 0; n * KEYS < keys; ++n) {
            set_keys(n);
            if (!sees(block.number)) continue;
            load_lines(size, [&](int64_t c) { return of_key(a.k, c); }, k);
            load_words(size, [&](int64_t c) { return of_key(a.v, c); }, v);
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
        multiply_strip(r, row, end, k, q_columns, -HUGE_VALF, s);
        score(r, row, end);
        for (int64_t n = 0; n < end - row; n += LINE) soften(r, row + n, s + n);
        add_to_rows(r, row, end, s, v);
    }

    // Scores of a vector of rows -> exponentials relative to their bases, in words
    void soften(const Range& r, int64_t row, float* s) {
        Vec highest = fill(-HUGE_VALF), other = highest;  // neither waits for the other
        for (int64_t c = r.first; c < r.last; c += 2) {
            highest = larger(load(s + c * STRIP), highest);
            other = larger(load(s + smaller(c + 1, r.last - 1) * STRIP), other);
        }
        const Vec by = fill(factor);
        highest = larger(highest, other) * by;
        if (largest(highest - load(base + row)) > SLACK) raise(row, highest);
        const Vec below = -load(base + row);
        Vec sum = load(rest + row);
        for (int64_t c = r.first; c < r.last; c += PAIR) {
            Vec e[PAIR];
            for (int64_t u = 0; u < PAIR; ++u) {
                e[u] = exponential(madd(load(s + (c + u) * STRIP), by, below));
                sum = sum + e[u];
            }
            store(Op::words(e), s + c / PAIR * STRIP);
        }
        store(sum, rest + row);
    }

    // Brings the bases of a vector of rows to `highest` where they lie lower, and with them what was summed.
    void raise(int64_t row, Vec highest) {
        float shrink[LINE];
        const Vec before = load(base + row), now = larger(highest, before);
        const Vec by = exponential(before - now);
        store(by, shrink);
        store(now, base + row);
        store(load(rest + row) * by, rest + row);
        for (int64_t i = row; i < smaller(row + LINE, rows); ++i)
            for (int64_t d = 0; d < D; d += LINE)
                store(load(sums + i * wide + d) * fill(shrink[i - row]), sums + i * wide + d);
    }

    // sums += weights' x for the rows [row, end), both in words
    void add_to_rows(const Range& r, int64_t row, int64_t end, const float* weights, const float* x) const {
        for (int64_t i = row; i < end; i += TILE) {
            const int64_t m = smaller(TILE, end - i);
            const Range seen = a.mask ? r : keys_of(i, i + m);
            const int64_t word = seen.first / PAIR, words = seen.last / PAIR - word;
            const float* from = weights + word * STRIP + i - row;
            multiply<Op, true>({from, STRIP, x + word * wide, wide, words, sums + i * wide, wide, true}, m, whole(D));
        }
    }

    // ---- backward ------------------------------------------------------------------------------------------------

    void backward() {
        auto q = [&](int64_t i) { return of(a.q, i); };
        auto dy = [&](int64_t i) { return of(a.dy, i); };
        load_columns(q, q_columns), load_words(rows, q, q_words);
        load_columns(dy, dy_columns), load_words(rows, dy, dy_words);
        clear(sums, rows * wide);
        for (int64_t i = 0; i < rows; ++i) {
            const T *y = of(a.y, i), *g = dy(i);
            rest[i] = -a.scale * sum(running(D, fill(0), [&](int64_t d, auto some, Vec before) {
                return madd(load(g + d, some), load(y + d, some), before);
            }));
            base[i] = lse(i);
        }
        for (int64_t i = rows; i < whole(rows); ++i) base[i] = HUGE_VALF, rest[i] = 0;
        for (int64_t n = 0; n * KEYS < keys; ++n) {
            set_keys(n);
            if (!sees(block.number)) continue;
            auto key = [&](int64_t c) { return of_key(a.k, c); };
            load_lines(size, key, k);
            if (k_words != k) load_words(size, key, k_words);
            load_lines(size, [&](int64_t c) { return of_key(a.v, c); }, v);
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
        const int64_t columns = whole(end - row);
        for (int64_t c = 0; c < size; ++c) {
            if (c == r.first && r.first < r.last) c = r.last;
            if (c >= size) break;
            const int64_t at = c * apart + row / PAIR;
            // whole vectors may reach into the next strip, which is yet to be written
            clear(p + at, columns / PAIR), clear(ds + at, columns / PAIR);
        }
        if (r.first == r.last) return;
        multiply_strip(r, row, end, k, q_columns, -HUGE_VALF, s);
        multiply_strip(r, row, end, v, dy_columns, 0, dp);
        score(r, row, end);
        for (int64_t n = 0; n < columns; n += LINE) slope(r, row + n, s + n, dp + n);
        add_to_rows(r, row, end, dp, k_words);
    }

    // A vector of rows: scores -> p in lines, dp -> ds in lines and in words
    void slope(const Range& r, int64_t row, const float* s, float* dp) const {
        const Vec scale = fill(a.scale), mean = load(rest + row), by = fill(factor), below = -load(base + row);
        const Vec inverse = fill(a.softcap == 0 ? 0 : 1 / a.softcap), one = fill(1);
        for (int64_t c = r.first; c < r.last; c += PAIR) {
            Vec e[PAIR], d[PAIR];
            for (int64_t u = 0; u < PAIR; ++u) {
                const Vec x = load(s + (c + u) * STRIP);
                e[u] = exponential(madd(x, by, below));
                d[u] = e[u] * madd(load(dp + (c + u) * STRIP), scale, mean);
                if (a.softcap != 0) {
                    const Vec t = larger(-one, x * inverse);  // -1 for what is not seen
                    d[u] = d[u] * (one - t * t);
                }
            }
            Op::put(e, p + c * apart, apart, row);
            Op::put(d, ds + c * apart, apart, row);
            store(Op::words(d), dp + c / PAIR * STRIP);
        }
    }

    // dv += p dy, dk += ds q, when the units before have done so
    void add_to_keys() const {
        int32_t* turn = a.turns + (block.document * a.Hk + head) * tiles(a.S, KEYS) + j;
        int32_t before = 0, after = 0;  // units
        for (int64_t n = block.number + 1; n * a.tokens < block.length; ++n) before += sees(n);
        for (int64_t n = 0; n < block.number; ++n) after += sees(n);
        for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != before; ++spins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 4000) sched_yield();  // the one waited for may need this processor
        }
        const int64_t place = ((block.batch * a.S + block.start + start) * a.Hk + head) * whole(D);
        add_to_keys(p, dy_words, before > 0, a.dv_sums + place);
        add_to_keys(ds, q_words, before > 0, a.dk_sums + place);
        if (after == 0) {
            keep_keys(a.dv_sums + place, a.dv);
            keep_keys(a.dk_sums + place, a.dk);
        }
        __atomic_store_n(turn, before + 1, __ATOMIC_RELEASE);
    }

    void add_to_keys(const float* weights, const float* x, bool add, float* to) const {
        const int64_t line = a.Hk * whole(D);
        for (int64_t c = 0; c < size; c += TILE) {
            const int64_t m = smaller(TILE, size - c);
            const Range seen = in_words(rows_of(c, c + m));
            const int64_t word = seen.first / PAIR, words = seen.last / PAIR - word;
            const float* from = weights + c * apart + word;
            multiply<Op, false>({from, apart, x + word * wide, wide, words, to + c * line, line, add}, m, whole(D));
        }
    }

    void keep_keys(const float* sums_of_keys, const HeadsView<T>& to) const {
        for (int64_t c = 0; c < size; ++c)
            keep(sums_of_keys + c * a.Hk * whole(D), 1, to.at(block.batch, block.start + start + c, head));
    }
};

// ---- all units -----------------------------------------------------------------------------------------------------

template <class T>
struct Job {
    const Attention<T>& a;
    bool backward;
    int64_t next;
};

template <class T, class Op>
void work(void* data, int64_t slot, int64_t) {
    Job<T>& job = *static_cast<Job<T>*>(data);
    const Attention<T>& a = job.a;
    Unit<T, Op> unit(a, a.space + slot * a.size, job.backward);
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
    auto* body = work<T, Single>;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2)
        if (a.pairs) body = work<T, Pairs>;
#endif
    lk_parallel_for(a.slots, 1, body, &job);
}

}  // namespace

extern "C" {

// Sizes for heads of D dimensions, `group` query heads to a key head: tokens of a block, keys of a block, and floats
// of one slot of `space`.
void LK_EXPORT(attention_sizes)(int64_t D, int64_t group, int64_t* sizes) {
    sizes[0] = bigger(1, smaller(MOST_ROWS, CACHED / whole(D)) / group);
    sizes[1] = KEYS;
    sizes[2] = Unit<float, Single>::floats(D, sizes[0] * group);
}

void LK_EXPORT(attention_fp32)(const Attention<float>* a) { run(*a, false); }
void LK_EXPORT(attention_bf16)(const Attention<uint16_t>* a) { run(*a, false); }
void LK_EXPORT(attention_backward_fp32)(const Attention<float>* a) { run(*a, true); }
void LK_EXPORT(attention_backward_bf16)(const Attention<uint16_t>* a) { run(*a, true); }

}  // extern "C"
