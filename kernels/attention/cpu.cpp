// Causal or masked attention on the CPU, forward and backward, in blocks of queries and keys: no T x S scores exist.
//
// A unit of work is a block of a document's tokens and one key head. Its rows are the tokens' query heads that read
// that key head, token by token, widened to fp32 (q, and in backward dy); they stay in the cache while the blocks of
// KEYS keys that any of them sees go by. Six rows at a time meet a block of keys:
//
//     forward    s = q k'   p = e^(s - largest so far)   o += p v    and at the end o / sum p, lse = ln sum e^s
//     backward   s = q k'   p = e^(s - lse)   dp = dy v'   ds = p (dp - dy . o) scale   dq += ds k
//                then, with all rows of the unit, dv += p' dy and dk += ds' q
//
// with s scaled, and capped where there is a soft cap c: s = c tanh(s / c), whose ds has the factor 1 - (s / c)^2.
// Every product is made of tiles of 6 x 16 sums that stay in registers. Keys nobody sees are left out of it: for six
// rows the scores in groups of 16, the sums over keys exactly; for six keys the rows of tokens that come too early.
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

constexpr int64_t ROWS = 6;          // of a tile of sums
constexpr int64_t KEYS = 64;         // of a block, a multiple of 16
constexpr int64_t APART = KEYS + 16;  // floats from row to row of what has a column per key: an odd number of lines

inline int64_t bigger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }
inline int64_t whole(int64_t n) { return tiles(n, 16) * 16; }

constexpr int64_t MOST_ROWS = 192;   // of a unit, if its tokens can be so few
constexpr int64_t CACHED = 12288;    // floats of q that a unit has, likewise
constexpr float SLACK = 16;          // e^16 times as many as there are keys is far below the largest float

// Floats from row to row of what has a column per dimension of a head: an odd number of cache lines, so that a column
// of a tile does not fall on the same few places of the cache.
inline int64_t width(int64_t D) { return (tiles(D, 16) | 1) * 16; }

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

// The same for `rows` <= ROWS and any number of columns that is a multiple of 16.
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

struct Range {  // of columns: those that a tile's rows may have to do with, and in groups of 16
    int64_t first, last, low, high;
    bool all;  // every row of the tile sees all of [low, high)
};

template <class T>
struct Unit {
    const Attention<T>& a;
    const int64_t D, wide, G;
    const float factor;  // that scores are still to be multiplied by when they have been capped, or not
    float *q, *dy, *o, *dq;     // [rows, wide]; backward has no o, forward neither dy nor dq
    float *kt, *vt, *kr, *vr;   // a block of keys: [D, APART], [KEYS, wide]
    float *p, *ds;              // [rows, APART], in forward [ROWS, APART]
    float *top, *total, *part;  // [rows]: the largest score or the lse; [rows, 8]: the sums; [rows]: dy . o

    // The document's block, its part of the batch, and a block of keys
    Block block;
    int64_t head, first, count, rows, keys, j, start, size;

    Unit(const Attention<T>& attention, float* space, bool backward)
        : a(attention), D(a.D), wide(width(a.D)), G(a.Hq / a.Hk), factor(a.softcap == 0 ? a.scale : 1) {
        const int64_t most = a.tokens * G;
        auto take = [&](int64_t floats) { return space += floats, space - floats; };
        q = take(most * wide), o = dq = take(most * wide);
        dy = backward ? take(most * wide) : nullptr;
        kt = take(wide * APART), vt = backward ? take(wide * APART) : nullptr;
        kr = vr = take(KEYS * wide);
        p = take((backward ? most : ROWS) * APART), ds = backward ? take(most * APART) : nullptr;
        top = take(most), part = total = take(8 * most);
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

    // ---- who sees what ----

    const uint8_t* mask(int64_t token) const {
        return a.mask + block.batch * a.mask_batch + token * a.mask_token + start;
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

    // The columns that the token sees: none before first, none from last on.
    void range(int64_t token, int64_t& from, int64_t& to) const {
        if (a.mask) {
            const uint8_t* m = mask(token);
            for (from = 0, to = size; from < to && !m[from]; ++from) {}
            while (to > from && !m[to - 1]) --to;
            return;
        }
        from = bigger(0, token - a.window + 1 - start);
        to = bigger(from, smaller(size, token + 1 - start));
    }

    Range range_of(int64_t row, int64_t m) const {
        Range r = {KEYS, 0, 0, 0, !a.mask};
        const int64_t earliest = first + row / G, latest = first + (row + m - 1) / G;
        int64_t most = 0, least = KEYS;
        for (int64_t t = earliest; t <= latest; ++t) {
            int64_t from, to;
            range(t, from, to);
            if (from < to) r.first = smaller(r.first, from), r.last = bigger(r.last, to);
            most = bigger(most, from), least = smaller(least, to);
        }
        if (r.first >= r.last) return {0, 0, 0, 0, true};
        r.low = r.first / 16 * 16, r.high = whole(r.last);
        r.all = r.all && most <= r.low && least >= r.high;
        return r;
    }

    // Per column c of a row: negative where its token sees the key. Eight at a time.
    void hide(int64_t row, const Range& r, float* signs) const {
        const int64_t token = first + row / G;
        if (a.mask) {
            const uint8_t* m = mask(token);
            for (int64_t c = r.low; c < r.high; ++c) signs[c] = c < size && m[c] ? -1.0f : 1.0f;
            return;
        }
        int64_t from, to;
        range(token, from, to);
        for (int64_t c = r.low; c < r.high; ++c) signs[c] = from <= c && c < to ? -1.0f : 1.0f;
    }

    // ---- moving ----

    // Rows of the unit -> [rows, wide], zeros behind D
    void gather(const View<const T>& x, float* to) const {
        for (int64_t t = 0; t < count; ++t)
            for (int64_t g = 0; g < G; ++g, to += wide)
                widen_row(x.at(block.batch, block.start + first + t, head * G + g), to);
    }

    void widen_row(const T* x, float* to) const {
        vectors(D, [&](int64_t i, auto some) { store(load(x + i, some), to + i); });
        for (int64_t i = tiles(D, 8) * 8; i < wide; i += 8) store(fill(0), to + i);
    }

    void keep(const float* row, float by, T* to) const {
        const Vec factor = fill(by);
        vectors(D, [&](int64_t i, auto some) { store(load(row + i) * factor, to + i, some); });
    }

    const T* key(const View<const T>& x, int64_t c) const { return x.at(block.batch, block.start + start + c, head); }

    void by_rows(const View<const T>& x, float* to) const {
        for (int64_t c = 0; c < size; ++c) widen_row(key(x, c), to + c * wide);
    }

    // Brings the n-th of `parts` parts of the next block of keys to the cache.
    void fetch(int64_t n, int64_t parts) const {
        const int64_t share = tiles(KEYS, parts), bytes = D * static_cast<int64_t>(sizeof(T));
        for (int64_t c = KEYS + n * share; c < smaller(KEYS + (n + 1) * share, keys - start); ++c) {
            const T* const pair[] = {key(a.k, c), key(a.v, c)};
            for (const T* x : pair) {
                const char* line = reinterpret_cast<const char*>(x);
                for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
            }
        }
    }

    // -> [D, APART], zeros behind the last key
    void by_columns(const View<const T>& x, float* to) const {
        for (int64_t c = 0; c < whole(size); c += 8) {
            vectors(D, [&](int64_t i, auto some) {
                Vec square[8];
                for (int64_t n = 0; n < 8; ++n)
                    square[n] = c + n < size ? load(key(x, c + n) + i, some) : fill(0);
                transpose(square);
                for (int64_t n = 0; n < 8; ++n) store(square[n], to + (i + n) * APART + c);
            });
        }
    }

    // ---- forward ----

    // Products q k' of a row, left to be scaled unless they are capped here; what the row does not see: -inf.
    void score(int64_t row, const Range& r, float* s) const {
        if (a.softcap != 0) {
            const Vec cap = fill(a.softcap), by = fill(a.scale / a.softcap);
            for (int64_t c = r.low; c < r.high; c += 8) store(cap * tanh(load(s + c) * by), s + c);
        }
        if (r.all) return;
        float signs[KEYS];
        hide(row, r, signs);
        for (int64_t c = r.low; c < r.high; c += 8)
            store(by_sign(load(signs + c), load(s + c), fill(-HUGE_VALF)), s + c);
    }

    void forward() {
        gather(a.q, q);
        for (int64_t i = 0; i < rows * wide; i += 8) store(fill(0), o + i);
        for (int64_t i = 0; i < rows; ++i) top[i] = -HUGE_VALF, store(fill(0), total + 8 * i);
        for (int64_t n = 0; n * KEYS < keys; ++n) {
            set_keys(n);
            if (!sees(block.number)) continue;
            by_columns(a.k, kt);
            by_rows(a.v, vr);
            for (int64_t row = 0; row < rows; row += ROWS) {
                fetch(row / ROWS, tiles(rows, ROWS));
                attend(row, smaller(ROWS, rows - row));
            }
        }
        for (int64_t i = 0; i < rows; ++i) {
            const float all = sum(load(total + 8 * i));  // 0: sees nothing
            const int64_t t = block.start + first + i / G, h = head * G + i % G;
            keep(o + i * wide, all == 0 ? 0 : 1 / all, a.y.at(block.batch, t, h));
            a.lse[(block.batch * a.Hq + h) * a.T_ + t] = all == 0 ? HUGE_VALF : top[i] + logf(all);
        }
    }

    void attend(int64_t row, int64_t m) {
        const Range r = range_of(row, m);
        if (r.first == r.last) return;
        multiply<false, false>(m, q + row * wide, wide, kt + r.low, APART, D, p + r.low, APART, r.high - r.low);
        for (int64_t i = 0; i < m; ++i) soften(row + i, r, p + i * APART);
        multiply<false, true>(m, p + r.first, APART, vr + r.first * wide, wide, r.last - r.first, o + row * wide, wide,
                              whole(D));
    }

    // Scores -> exponentials relative to the row's base, which is raised, and what was summed brought to it, only
    // where a score lies SLACK above it: the next exponentials need not wait for the largest score to be known.
    void soften(int64_t row, const Range& r, float* s) {
        score(row, r, s);
        Vec most = fill(-HUGE_VALF);
        for (int64_t c = r.low; c < r.high; c += 8) most = larger(load(s + c), most);
        float base = top[row];
        const float found = largest(most) * factor;
        if (found > base + SLACK) base = raise(row, found);
        const Vec by = fill(factor), below = fill(base == -HUGE_VALF ? 0 : -base);  // nothing seen yet: e^-inf, all 0
        Vec added = load(total + 8 * row);
        for (int64_t c = r.low; c < r.high; c += 8) {
            const Vec e = exponential(madd(load(s + c), by, below));
            store(e, s + c);
            added = added + e;
        }
        store(added, total + 8 * row);
    }

    float raise(int64_t row, float base) {
        const Vec shrink = exponential(fill(top[row]) - fill(base));
        float* sums = o + row * wide;
        for (int64_t i = 0; i < D; i += 8) store(load(sums + i) * shrink, sums + i);
        store(load(total + 8 * row) * shrink, total + 8 * row);
        return top[row] = base;
    }

    // ---- backward ----

    void backward() {
        gather(a.q, q);
        gather(a.dy, dy);
        for (int64_t i = 0; i < rows * wide; i += 8) store(fill(0), dq + i);
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t t = block.start + first + i / G, h = head * G + i % G;
            const T* y = a.y.at(block.batch, t, h);
            part[i] = sum(running(D, fill(0), [&](int64_t d, auto some, Vec before) {
                return madd(load(dy + i * wide + d), load(y + d, some), before);
            }));
            top[i] = a.lse[(block.batch * a.Hq + h) * a.T_ + t];
        }
        for (int64_t n = 0; n * KEYS < keys; ++n) {
            set_keys(n);
            if (!sees(block.number)) continue;
            by_columns(a.k, kt);
            by_columns(a.v, vt);
            by_rows(a.k, kr);
            for (int64_t row = 0; row < rows; row += ROWS) {
                fetch(row / ROWS, tiles(rows, ROWS));
                differentiate(row, smaller(ROWS, rows - row));
            }
            add();
        }
        for (int64_t i = 0; i < rows; ++i)
            keep(dq + i * wide, 1, a.dq.at(block.batch, block.start + first + i / G, head * G + i % G));
    }

    // p and ds of m rows, in all columns; dq += ds k
    void differentiate(int64_t row, int64_t m) {
        const Range r = range_of(row, m);
        float *ps = p + row * APART, *dss = ds + row * APART;
        if (r.first < r.last) {
            const int64_t columns = r.high - r.low;
            multiply<false, false>(m, q + row * wide, wide, kt + r.low, APART, D, ps + r.low, APART, columns);
            multiply<false, false>(m, dy + row * wide, wide, vt + r.low, APART, D, dss + r.low, APART, columns);
        }
        for (int64_t i = 0; i < m; ++i) {
            float *x = ps + i * APART, *dx = dss + i * APART;
            slope(row + i, r, x, dx);
            for (int64_t c = 0; c < r.low; c += 8) store(fill(0), x + c), store(fill(0), dx + c);
            for (int64_t c = r.high; c < whole(size); c += 8) store(fill(0), x + c), store(fill(0), dx + c);
        }
        if (r.first == r.last) return;
        multiply<false, true>(m, dss + r.first, APART, kr + r.first * wide, wide, r.last - r.first, dq + row * wide,
                              wide, whole(D));
    }

    // q k' -> p, dp -> ds, of one row
    void slope(int64_t row, const Range& r, float* s, float* d) const {
        score(row, r, s);
        const Vec scale = fill(a.scale), mean = fill(-part[row] * a.scale);
        for (int64_t c = r.low; c < r.high; c += 8) store(madd(load(d + c), scale, mean), d + c);
        if (a.softcap != 0) {
            const Vec by = fill(1 / a.softcap), one = fill(1);
            for (int64_t c = r.low; c < r.high; c += 8) {
                const Vec t = larger(-one, load(s + c) * by);  // -1 for what is not seen
                store(load(d + c) * (one - t * t), d + c);
            }
        }
        const Vec by = fill(factor), below = fill(-top[row]);
        for (int64_t c = r.low; c < r.high; c += 8) {
            const Vec e = exponential(madd(load(s + c), by, below));
            store(e, s + c);
            store(e * load(d + c), d + c);
        }
    }

    // dv += p' dy, dk += ds' q, when those before have done so
    void add() const {
        int32_t* turn = a.turns + (block.document * a.Hk + head) * tiles(a.S, KEYS) + j;
        int32_t mine = 0;
        for (int64_t n = block.number + 1; n * a.tokens < block.length; ++n) mine += sees(n);
        for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; ++spins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 4000) sched_yield();  // the one waited for may need this processor
        }
        const int64_t padded = whole(D), apart = a.Hk * padded;
        const int64_t place = ((block.batch * a.S + block.start + start) * a.Hk + head) * padded;
        for (int64_t d = 0; d < padded; d += 16) {
            for (int64_t c = 0; c < size; c += ROWS) {
                const int64_t m = smaller(ROWS, size - c);
                int64_t from = 0, to = rows;
                if (!a.mask) {  // the rows of the tokens between the first key and the last one's window
                    from = bigger(0, start + c - first) * G;
                    to = smaller(count, start + c + m - 1 + a.window - first) * G;
                }
                const int64_t depth = to - from, at = from * APART + c, there = place + c * apart + d;
                if (depth <= 0) continue;
                multiply<true, true>(m, p + at, APART, dy + from * wide + d, wide, depth, a.dv + there, apart, 16);
                multiply<true, true>(m, ds + at, APART, q + from * wide + d, wide, depth, a.dk + there, apart, 16);
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
    const int64_t wide = width(D);
    const int64_t tokens = bigger(1, smaller(MOST_ROWS, CACHED / whole(D)) / group), rows = tokens * group;
    sizes[0] = tokens;
    sizes[1] = KEYS;
    sizes[2] = whole(3 * rows * wide + 2 * wide * APART + KEYS * wide + 2 * bigger(rows, ROWS) * APART + 9 * rows);
}

void LK_EXPORT(attention_fp32)(const Attention<float>* a) { run(*a, false); }
void LK_EXPORT(attention_bf16)(const Attention<uint16_t>* a) { run(*a, false); }
void LK_EXPORT(attention_backward_fp32)(const Attention<float>* a) { run(*a, true); }
void LK_EXPORT(attention_backward_bf16)(const Attention<uint16_t>* a) { run(*a, true); }

}  // extern "C"
