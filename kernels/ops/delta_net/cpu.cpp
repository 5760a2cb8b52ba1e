// The gated delta rule on the CPU, forward and backward, in chunks of tokens. __init__.py has the formulas.
//
// A unit of work is a document and a key head: the value heads that read the key head share what is made of q and k
// alone. Its chunks begin at the document's first token and come one after the other, with the state S of each value
// head in the cache. So no bit of a document depends on another, or on the number of threads.
//
//     forward    x = k S                n = beta (v - e^L x), solved for (1 - a) n in place, a = -(beta k k') P below
//                y = e^L (q S) + m n    m = (q k') P        S = e^L_last S + k' (e^(L_last - L) n)
//     backward   dn = m' dy + e^(L_last - L) (k dS)         solved for (1 - a)': dr
//                dm = dy n'             da = -dr n'         dv = beta dr
//                dq = e^L (dy S') + (dm P) k
//                dk = e^(L_last - L) (n dS') - beta e^L (dr S') + (dm P)' q + h k + h' k,        h = beta da P
//                dS = e^L_last dS + q' (e^L dy) - k' (beta e^L dr)
//
// with x' for the transpose of x. The gradient of L_i is what it multiplies times the gradient of that; of g_i it is the
// sum over all that follow in the chunk.
//
// For backward, forward keeps the state before every span of SPAN chunks but the first: with heads of 128, 256 bytes a
// token and value head, as much as v has in bf16. Backward goes through the spans from the last, and computes the states
// and n of a span's chunks again.
//
// L is summed in fp64 and kept as two floats, high + low, so that differences of large sums are exact to fp32.
#if defined(__AVX512F__)
#define LORAKIT_ANY_LANES
#endif
#include "heads.h"

#include <math.h>

namespace {

using namespace simd;

constexpr int64_t CHUNK = 32;          // tokens: whole vectors
constexpr int64_t SPAN = 8;            // chunks between states that are kept
constexpr int64_t ROW = width(CHUNK);  // floats from row to row of what has a column per token
constexpr float EPS = 1e-6f;           // added to the sum of squares of a q or k

// ---- what Python hands over (cpu.py has the same layouts) ----------------------------------------------------------

struct Document {
    int64_t row, start, length;  // in tokens
    int64_t kept;                // the number of the first state that is kept of it
};

template <class T>
struct DeltaNet {
    HeadsView<const T> q, k, v, dy;
    HeadsView<T> y, dq, dk, dv;
    const float *g, *beta;  // [B, T, nv]
    float *dg, *dbeta;
    const float* before;  // [B, nv, dk, dv], null: zeros
    float* after;         // likewise, null: not asked for
    float* kept;          // [states, nv, dk, dv], null: there is no backward
    const Document* documents;
    float* space;  // [slots, size]
    int64_t count, slots, size;
    int64_t T_, nk, nv, Dk, Dv;
};

// ---- products of whole chunks --------------------------------------------------------------------------------------

// What of a product's a or c is zero, or not asked for: nothing; above the diagonal of a; below it; above that of c.
enum class Zero { nowhere, above, below, above_out };

// Strips of columns come first, so that a strip of b stays in the nearest cache.
template <bool TRANSPOSED, Zero ZERO = Zero::nowhere>
void product(const Product& x, int64_t rows, int64_t columns) {
    for (int64_t j = 0, across; j < columns; j += across * LINE) {
        const int64_t left = (columns - j) / LINE;
        across = left == 4 ? 2 : smaller(left, ACROSS);  // as in multiply
        for (int64_t i = 0; i < rows; i += TILE) {
            const int64_t m = smaller(TILE, rows - i);
            if (ZERO == Zero::above_out && j >= i + m) continue;
            Product part = x;
            part.a += TRANSPOSED ? i : i * x.a_apart;
            part.c += i * x.c_apart;
            if (ZERO == Zero::above) part.words = smaller(x.words, i + m);
            if (ZERO == Zero::below) {
                part.a += i * (TRANSPOSED ? x.a_apart : 1);
                part.b += i * x.b_apart;
                part.words -= i;
            }
            tile<Single, TRANSPOSED>(part, j, m, across);
        }
    }
}

// to [columns, rows] = from' in whole vectors
void turn(const float* from, int64_t apart, int64_t rows, int64_t columns, float* to, int64_t to_apart) {
    for (int64_t i = 0; i < rows; i += LINE) {
        for (int64_t j = 0; j < columns; j += LINE) {
            Vec square[LINE];
            for (int64_t n = 0; n < LINE; ++n) square[n] = load(from + (i + n) * apart + j);
            transpose(square);
            for (int64_t n = 0; n < LINE; ++n) store(square[n], to + (j + n) * to_apart + i);
        }
    }
}

// to += by x
inline void add(float* to, float by, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE) store(madd(fill(by), load(x + i), load(to + i)), to + i);
}

// to = by x
inline void scale(float* to, float by, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE) store(fill(by) * load(x + i), to + i);
}

template <class X, class Y>
float dot(const X* x, const Y* y, int64_t n) {
    return sum(running(n, fill(0), [&](int64_t i, auto some, Vec before) {
        return madd(load(x + i, some), load(y + i, some), before);
    }));
}

// ---- one unit ------------------------------------------------------------------------------------------------------

template <class T>
struct Unit {
    const DeltaNet<T>& a;
    const int64_t Dk, Dv, G, wide_k, wide_v, state;  // floats from row to row of k and v, and of one state
    const float root;                                // Dk^-1/2
    float *q, *k;                                    // normalized, [CHUNK, wide_k]
    float* k_columns;                                // [whole(Dk), ROW]
    float *kk, *qk;                                  // products k k' and q k', [CHUNK, ROW]
    float *below, *m;                                // the a and m of above
    float *x, *n_;                                   // [CHUNK, wide_v]
    float* states;                                   // [G or SPAN, state]
    // in backward alone:
    float *ns, *v, *dy, *dr;                // n of a span's chunks; [CHUNK, wide_v]
    float *n_columns, *S_turned;            // [whole(Dv), ROW or wide_k]
    float *dm, *da;                         // [CHUNK, ROW]
    float *y_states, *r_states, *n_states;  // dy S', dr S', n dS' [CHUNK, wide_k]
    float *dq, *dk;                         // of a span [SPAN CHUNK, wide_k]
    float* dS;                              // [G, state]

    Document document;
    int64_t head;      // of the keys
    int64_t first, n;  // a chunk: its first token in the document, and its tokens
    bool fresh, last;  // whether nothing lies before it, or behind it
    alignas(64) float high[CHUNK], low[CHUNK], decay[CHUNK], rest[CHUNK], beta[CHUNK];  // e^L, e^(L_last - L)

    Unit(const DeltaNet<T>& net, float* space, bool backward)
        : a(net), Dk(net.Dk), Dv(net.Dv), G(net.nv / net.nk), wide_k(width(Dk)), wide_v(width(Dv)),
          state(whole(Dk) * wide_v), root(1 / sqrtf(static_cast<float>(Dk))) {
        auto take = [&](int64_t floats) {
            space += floats;
            return space - floats;
        };
        q = take(CHUNK * wide_k), k = take(CHUNK * wide_k), k_columns = take(whole(Dk) * ROW);
        kk = take(CHUNK * ROW), qk = take(CHUNK * ROW), below = take(CHUNK * ROW), m = take(CHUNK * ROW);
        x = take(CHUNK * wide_v), n_ = take(CHUNK * wide_v);
        states = take((backward ? SPAN : G) * state);
        if (!backward) return;
        ns = take(SPAN * CHUNK * wide_v), v = take(CHUNK * wide_v);
        dy = take(CHUNK * wide_v), dr = take(CHUNK * wide_v);
        n_columns = take(whole(Dv) * ROW), S_turned = take(whole(Dv) * wide_k);
        dm = take(CHUNK * ROW), da = take(CHUNK * ROW);
        y_states = take(CHUNK * wide_k), r_states = take(CHUNK * wide_k), n_states = take(CHUNK * wide_k);
        dq = take(SPAN * CHUNK * wide_k), dk = take(SPAN * CHUNK * wide_k);
        dS = take(G * state);
    }

    static int64_t floats(int64_t Dk, int64_t Dv, int64_t G, bool backward) {
        const int64_t wide_k = width(Dk), wide_v = width(Dv), state = whole(Dk) * wide_v;
        const int64_t forward = 2 * CHUNK * (wide_k + wide_v) + (whole(Dk) + 4 * CHUNK) * ROW;
        if (!backward) return forward + G * state;
        return forward + (SPAN + G) * state + (SPAN + 3) * CHUNK * wide_v + (2 * SPAN + 3) * CHUNK * wide_k +
               whole(Dv) * (ROW + wide_k) + 2 * CHUNK * ROW;
    }

    void set(int64_t u) {
        document = a.documents[u / a.nk];
        head = u % a.nk;
    }

    void set_chunk(int64_t token) {
        first = token;
        n = smaller(CHUNK, document.length - first);
        fresh = first == 0 && !a.before;
        last = first + n == document.length;
    }

    int64_t token(int64_t i) const { return document.start + first + i; }
    int64_t gate(int64_t i, int64_t g) const { return (document.row * a.T_ + token(i)) * a.nv + head * G + g; }
    template <class X>
    X* of(const HeadsView<X>& view, int64_t i, int64_t h) const {
        return view.at(document.row, token(i), h);
    }

    // ---- what q, k and the gates are made into ----

    float norm(const T* row) const { return 1 / sqrtf(dot(row, row, Dk) + EPS); }

    void load_normalized(const HeadsView<const T>& view, float by, float* to) const {
        for (int64_t i = 0; i < n; ++i) {
            const T* row = of(view, i, head);
            clear(to + i * wide_k + whole(Dk) - 16, 16);
            const Vec factor = fill(norm(row) * by);
            vectors(Dk, [&](int64_t d, auto some) { store(load(row + d, some) * factor, to + i * wide_k + d); });
        }
    }

    void load_keys() {
        load_normalized(a.k, 1, k);
        turn(k, wide_k, whole(n), whole(Dk), k_columns, ROW);
        product<false, Zero::above_out>({k, wide_k, k_columns, ROW, Dk, kk, ROW, false}, n, whole(n));
    }

    void load_queries() {
        load_normalized(a.q, root, q);
        product<false, Zero::above_out>({q, wide_k, k_columns, ROW, Dk, qk, ROW, false}, n, whole(n));
    }

    void load_gates(int64_t g) {
        double total = 0, sums[CHUNK];
        for (int64_t i = 0; i < CHUNK; ++i) {
            if (i < n) total += static_cast<double>(a.g[gate(i, g)]);
            sums[i] = total;
            high[i] = static_cast<float>(total);
            low[i] = static_cast<float>(total - static_cast<double>(high[i]));
            beta[i] = i < n ? a.beta[gate(i, g)] : 0;
        }
        for (int64_t i = 0; i < CHUNK; ++i) rest[i] = static_cast<float>(total - sums[i]);
        for (int64_t i = 0; i < CHUNK; i += LINE) {
            store(exponential(load(high + i)), decay + i);
            store(exponential(load(rest + i)), rest + i);
        }
        for (int64_t i = 0; i < n; ++i)
            fill_row(below, i, i, [&](int64_t j) { return fill(-beta[i]) * load(kk + i * ROW + j) * between(i, j); });
    }

    // e^(L_i - L_j) for a vector of j; beyond i it means nothing, but is finite.
    Vec between(int64_t i, int64_t j) const {
        const Vec difference = (fill(high[i]) - load(high + j)) + (fill(low[i]) - load(low + j));
        return exponential(smaller(difference, fill(88)));
    }

    // Row i of a matrix is f(j) up to column `end`, and 0 from there on.
    template <class F>
    void fill_row(float* matrix, int64_t i, int64_t end, F f) const {
        for (int64_t j = 0; j < CHUNK; j += LINE) {
            const Vec all = j < end ? f(j) : fill(0);
            store(end - j >= LINE || j >= end ? all : only(all, First{end - j}, 0), matrix + i * ROW + j);
        }
    }

    void load_m() {
        for (int64_t i = 0; i < n; ++i)
            fill_row(m, i, i + 1, [&](int64_t j) { return load(qk + i * ROW + j) * between(i, j); });
    }

    void load_values(const HeadsView<const T>& view, int64_t g, float* to) const {
        for (int64_t i = 0; i < n; ++i) {
            const T* row = of(view, i, head * G + g);
            clear(to + i * wide_v + whole(Dv) - 16, 16);
            vectors(Dv, [&](int64_t d, auto some) { store(load(row + d, some), to + i * wide_v + d); });
        }
    }

    void keep(const float* row, float by, T* to, int64_t D) const {
        vectors(D, [&](int64_t d, auto some) { store(load(row + d) * fill(by), to + d, some); });
    }

    // ---- the triangular systems ----

    // y = (1 - below)^-1 y
    void solve(float* y) const {
        for (int64_t i = 0; i < n; i += TILE) {
            const int64_t rows = smaller(TILE, n - i);
            multiply<Single, false>({below + i * ROW, ROW, y, wide_v, i, y + i * wide_v, wide_v, true}, rows,
                                    whole(Dv));
            for (int64_t r = i + 1; r < i + rows; ++r)
                for (int64_t j = i; j < r; ++j) add(y + r * wide_v, below[r * ROW + j], y + j * wide_v, whole(Dv));
        }
    }

    // y = (1 - below)'^-1 y
    void solve_turned(float* y) const {
        for (int64_t i = (n - 1) / TILE * TILE; i >= 0; i -= TILE) {
            const int64_t end = smaller(i + TILE, n);
            multiply<Single, true>({below + end * ROW + i, ROW, y + end * wide_v, wide_v, n - end, y + i * wide_v,
                                    wide_v, true},
                                   end - i, whole(Dv));
            for (int64_t r = end - 2; r >= i; --r)
                for (int64_t j = r + 1; j < end; ++j)
                    add(y + r * wide_v, below[j * ROW + r], y + j * wide_v, whole(Dv));
        }
    }

    // ---- forward ----

    // n [CHUNK, wide_v] of a value head, from its state
    void load_n(int64_t g, const float* S, float* to) {
        load_values(a.v, g, to);
        if (!fresh) product<false>({k, wide_k, S, wide_v, Dk, x, wide_v, false}, n, whole(Dv));
        for (int64_t i = 0; i < n; ++i) {
            float* row = to + i * wide_v;
            if (!fresh) add(row, -decay[i], x + i * wide_v, whole(Dv));
            scale(row, beta[i], row, whole(Dv));
        }
        solve(to);
    }

    // The state behind the chunk; `from` may be `to`, and x is overwritten.
    void advance(const float* from, const float* found, float* to) {
        for (int64_t i = 0; i < n; ++i) scale(x + i * wide_v, rest[i], found + i * wide_v, whole(Dv));
        if (!fresh)
            for (int64_t i = 0; i < state; i += LINE) store(fill(decay[n - 1]) * load(from + i), to + i);
        product<true>({k, wide_k, x, wide_v, n, to, wide_v, !fresh}, Dk, whole(Dv));
    }

    void read(int64_t g, const float* S) {
        if (!fresh) {
            product<false>({q, wide_k, S, wide_v, Dk, x, wide_v, false}, n, whole(Dv));
            for (int64_t i = 0; i < n; ++i) scale(x + i * wide_v, decay[i], x + i * wide_v, whole(Dv));
        }
        product<false, Zero::above>({m, ROW, n_, wide_v, n, x, wide_v, !fresh}, n, whole(Dv));
        for (int64_t i = 0; i < n; ++i) keep(x + i * wide_v, 1, of(a.y, i, head * G + g), Dv);
    }

    // A dense state, as Python has it, to the rows of ours and back.
    void take_state(const float* from, float* to) const {
        clear(to, state);
        for (int64_t d = 0; d < Dk; ++d)
            vectors(Dv, [&](int64_t i, auto some) { store(load(from + d * Dv + i, some), to + d * wide_v + i); });
    }
    void give_state(const float* from, float* to) const {
        for (int64_t d = 0; d < Dk; ++d)
            vectors(Dv, [&](int64_t i, auto some) { store(load(from + d * wide_v + i), to + d * Dv + i, some); });
    }
    int64_t place(int64_t number, int64_t g) const { return (number * a.nv + head * G + g) * Dk * Dv; }

    void forward() {
        if (document.length == 1) return step();
        for (int64_t g = 0; g < G; ++g) {
            if (a.before)
                take_state(a.before + place(document.row, g), states + g * state);
            else
                clear(states + g * state, state);  // the rows that fill up the last vector, too
        }
        for (int64_t token = 0; token < document.length; token += CHUNK) {
            set_chunk(token);
            load_keys(), load_queries();
            const int64_t spans = token / (SPAN * CHUNK);
            const bool keeps = a.kept && spans > 0 && token % (SPAN * CHUNK) == 0;
            for (int64_t g = 0; g < G; ++g) {
                float* S = states + g * state;
                if (keeps) give_state(S, a.kept + place(document.kept + spans - 1, g));
                load_gates(g), load_m();
                load_n(g, S, n_);
                read(g, S);
                if (!last || a.after) advance(S, n_, S);
                if (last && a.after) give_state(S, a.after + place(document.row, g));
            }
        }
    }

    // One token: what S says of k and q is read in one pass, and S is written in a second.
    void step() {
        set_chunk(0);
        load_normalized(a.k, 1, k), load_normalized(a.q, root, q);
        const float qk = dot(q, k, Dk);
        for (int64_t g = 0; g < G; ++g) {
            load_values(a.v, g, n_);
            const float by = expf(a.g[gate(0, g)]), correction = a.beta[gate(0, g)];
            const float* S = a.before ? a.before + place(document.row, g) : nullptr;
            clear(x, whole(Dv));
            if (S) {
                float* asked = x + wide_v;
                int64_t i = 0;
                for (; i + 4 * LINE <= Dv; i += 4 * LINE) ask<4>(S, i, All{}, asked);
                for (; i < Dv; i += LINE) Dv - i < LINE ? ask<1>(S, i, First{Dv - i}, asked) : ask<1>(S, i, All{}, asked);
                add(n_, -by, asked, whole(Dv));
                scale(x, by, x, whole(Dv));
            }
            scale(n_, correction, n_, whole(Dv));
            add(x, qk, n_, whole(Dv));
            keep(x, 1, of(a.y, 0, head * G + g), Dv);
            if (!a.after) continue;
            float* after = a.after + place(document.row, g);
            for (int64_t d = 0; d < Dk; ++d)
                vectors(Dv, [&](int64_t i, auto some) {
                    const Vec written = fill(k[d]) * load(n_ + i);
                    store(S ? madd(fill(by), load(S + d * Dv + i, some), written) : written, after + d * Dv + i, some);
                });
        }
    }

    // W vectors of S' k to `of_k` and of S' q to x
    template <int W, class Part>
    void ask(const float* S, int64_t i, Part some, float* of_k) const {
        Vec sums[2][W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sums[0][w] = sums[1][w] = fill(0);
        for (int64_t d = 0; d < Dk; ++d) {
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) {
                const Vec row = load(S + d * Dv + i + w * LINE, some);
                sums[0][w] = madd(fill(k[d]), row, sums[0][w]);
                sums[1][w] = madd(fill(q[d]), row, sums[1][w]);
            }
        }
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) store(sums[0][w], of_k + i + w * LINE), store(sums[1][w], x + i + w * LINE);
    }

    // ---- backward ----

    void backward() {
        const int64_t size = SPAN * CHUNK;
        for (int64_t span = (document.length - 1) / size; span >= 0; --span) {
            const int64_t end = smaller(document.length, (span + 1) * size);
            clear(dq, size * wide_k), clear(dk, size * wide_k);
            for (int64_t g = 0; g < G; ++g) {
                if (span > 0)
                    take_state(a.kept + place(document.kept + span - 1, g), states);
                else if (a.before)
                    take_state(a.before + place(document.row, g), states);
                int64_t c = 0;
                for (; span * size + c * CHUNK < end; ++c) {
                    set_chunk(span * size + c * CHUNK);
                    load_keys(), load_gates(g);
                    load_n(g, states + c * state, ns + c * CHUNK * wide_v);
                    if (first + n < end) advance(states + c * state, ns + c * CHUNK * wide_v, states + (c + 1) * state);
                }
                while (c-- > 0) {
                    set_chunk(span * size + c * CHUNK);
                    load_keys(), load_queries(), load_gates(g), load_m();
                    const int64_t at = c * CHUNK * wide_k;
                    differentiate(g, states + c * state, ns + c * CHUNK * wide_v, dS + g * state, dq + at, dk + at);
                }
            }
            for (first = span * size; first < end; first += CHUNK) {
                n = smaller(CHUNK, end - first);
                const int64_t at = (first - span * size) * wide_k;
                give(a.q, root, dq + at, a.dq), give(a.k, 1, dk + at, a.dk);
            }
        }
    }

    // The gradient of a row from that of the row normalized and multiplied by `by`.
    void give(const HeadsView<const T>& view, float by, const float* grads, const HeadsView<T>& to) const {
        for (int64_t i = 0; i < n; ++i) {
            const T* row = of(view, i, head);
            const float* grad = grads + i * wide_k;
            const float factor = norm(row), along = factor * factor * dot(row, grad, Dk);
            T* out = of(to, i, head);
            vectors(Dk, [&](int64_t d, auto some) {
                store((load(grad + d) - fill(along) * load(row + d, some)) * fill(factor * by), out + d, some);
            });
        }
    }

    // dS of a value head is that of the state behind the chunk, and becomes that of the state before it.
    void differentiate(int64_t g, const float* S, const float* found, float* grad, float* to_q, float* to_k) {
        alignas(64) float slopes[CHUNK], columns[CHUNK];  // of L
        load_values(a.v, g, v), load_values(a.dy, g, dy);
        turn(found, wide_v, whole(n), whole(Dv), n_columns, ROW);
        if (!last) {
            product<false>({k, wide_k, grad, wide_v, Dk, dr, wide_v, false}, n, whole(Dv));
            for (int64_t i = 0; i < n; ++i) scale(dr + i * wide_v, rest[i], dr + i * wide_v, whole(Dv));
        }
        product<true, Zero::below>({m, ROW, dy, wide_v, n, dr, wide_v, !last}, n, whole(Dv));
        solve_turned(dr);
        product<false, Zero::above_out>({dy, wide_v, n_columns, ROW, Dv, dm, ROW, false}, n, whole(n));
        product<false, Zero::above_out>({dr, wide_v, n_columns, ROW, Dv, da, ROW, false}, n, whole(n));
        clear(columns, CHUNK);
        for (int64_t i = 0; i < n; ++i) slopes[i] = differentiate_row(g, i, columns);
        for (int64_t i = 0; i < n; ++i) slopes[i] -= columns[i];
        double total = through_states(g, S, found, grad, slopes, to_q, to_k);
        product<false, Zero::above>({dm, ROW, k, wide_k, n, to_q, wide_k, true}, n, whole(Dk));
        product<false, Zero::above>({da, ROW, k, wide_k, n, to_k, wide_k, true}, n, whole(Dk));
        product<true, Zero::below>({dm, ROW, q, wide_k, n, to_k, wide_k, true}, n, whole(Dk));
        product<true, Zero::below>({da, ROW, k, wide_k, n, to_k, wide_k, true}, n, whole(Dk));
        for (int64_t i = n - 1; i >= 0; --i) {
            total += static_cast<double>(slopes[i]);
            a.dg[gate(i, g)] = static_cast<float>(total);
        }
        if (fresh) return;
        for (int64_t i = 0; i < n; ++i) {
            scale(dy + i * wide_v, decay[i], dy + i * wide_v, whole(Dv));
            scale(dr + i * wide_v, -beta[i] * decay[i], dr + i * wide_v, whole(Dv));
        }
        if (!last)
            for (int64_t i = 0; i < state; i += LINE) store(fill(decay[n - 1]) * load(grad + i), grad + i);
        product<true>({q, wide_k, dy, wide_v, n, grad, wide_v, !last}, Dk, whole(Dv));
        product<true>({k, wide_k, dr, wide_v, n, grad, wide_v, true}, Dk, whole(Dv));
    }

    // Row i of dm and da becomes that of dm P and h; returns the slope that L_i has from P, and adds to what L_j lose.
    float differentiate_row(int64_t g, int64_t i, float* columns) {
        float *of_m = dm + i * ROW, *of_a = da + i * ROW;
        Vec slope = fill(0), of_beta = fill(0);
        for (int64_t j = 0; j <= i; j += LINE) {
            const First before = {smaller(i - j, LINE)};  // j < i: nothing of the diagonal depends on L
            const Vec P = between(i, j), grad = load(of_m + j), other = only(-load(of_a + j) * P, before, 0);
            const Vec terms = only(grad * load(m + i * ROW + j), before, 0);
            const Vec product = other * load(kk + i * ROW + j), both = madd(fill(beta[i]), product, terms);
            slope = slope + both;
            of_beta = of_beta + product;
            store(load(columns + j) + both, columns + j);
            store(only(grad * P, First{smaller(i + 1 - j, LINE)}, 0), of_m + j);
            store(other * fill(beta[i]), of_a + j);
        }
        for (int64_t j = (i / LINE + 1) * LINE; j < CHUNK; j += LINE) store(fill(0), of_m + j), store(fill(0), of_a + j);
        a.dbeta[gate(i, g)] = sum(of_beta);
        return sum(slope);
    }

    // What goes through the states before and behind the chunk, and through v; returns the slope of L_last.
    double through_states(int64_t g, const float* S, const float* found, const float* grad, float* slopes, float* to_q,
                          float* to_k) {
        double total = 0;
        if (!fresh) {
            turn(S, wide_v, whole(Dk), whole(Dv), S_turned, wide_k);
            product<false>({dy, wide_v, S_turned, wide_k, Dv, y_states, wide_k, false}, n, whole(Dk));
            product<false>({dr, wide_v, S_turned, wide_k, Dv, r_states, wide_k, false}, n, whole(Dk));
        }
        if (!last) {
            turn(grad, wide_v, whole(Dk), whole(Dv), S_turned, wide_k);
            product<false>({found, wide_v, S_turned, wide_k, Dv, n_states, wide_k, false}, n, whole(Dk));
            for (int64_t d = 0; !fresh && d < Dk; ++d)
                total += static_cast<double>(decay[n - 1] * dot(S + d * wide_v, grad + d * wide_v, Dv));
        }
        for (int64_t i = 0; i < n; ++i) {
            const int64_t row = i * wide_k;
            float& dbeta = a.dbeta[gate(i, g)];
            dbeta += dot(dr + i * wide_v, v + i * wide_v, Dv);
            keep(dr + i * wide_v, beta[i], of(a.dv, i, head * G + g), Dv);
            if (!fresh) {
                const float by = decay[i], of_r = by * dot(k + row, r_states + row, Dk);
                dbeta -= of_r;
                slopes[i] += by * dot(q + row, y_states + row, Dk) - beta[i] * of_r;
                add(to_q + row, by, y_states + row, whole(Dk));
                add(to_k + row, -beta[i] * by, r_states + row, whole(Dk));
            }
            if (!last) {
                const float of_n = rest[i] * dot(k + row, n_states + row, Dk);
                slopes[i] -= of_n;
                total += static_cast<double>(of_n);
                add(to_k + row, rest[i], n_states + row, whole(Dk));
            }
        }
        return total;
    }
};

// ---- all units -----------------------------------------------------------------------------------------------------

template <class T>
struct Job {
    const DeltaNet<T>& a;
    bool backward;
    int64_t next;
};

template <class T>
void work(void* data, int64_t slot, int64_t) {
    Job<T>& job = *static_cast<Job<T>*>(data);
    const DeltaNet<T>& a = job.a;
    Unit<T> unit(a, a.space + slot * a.size, job.backward);
    for (;;) {
        const int64_t u = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
        if (u >= a.count * a.nk) return;
        unit.set(u);
        if (job.backward)
            unit.backward();
        else
            unit.forward();
    }
}

template <class T>
void run(const DeltaNet<T>& a, bool backward) {
    Job<T> job{a, backward, 0};
    lk_parallel_for(a.slots, 1, work<T>, &job);
}

}  // namespace

extern "C" {

// Sizes for heads of Dk and Dv dimensions, `group` value heads to a key head: tokens of a span, and floats of one slot of
// `space` forward and backward.
void LK_EXPORT(delta_net_sizes)(int64_t Dk, int64_t Dv, int64_t group, int64_t* sizes) {
    sizes[0] = SPAN * CHUNK;
    sizes[1] = Unit<float>::floats(Dk, Dv, group, false);
    sizes[2] = Unit<float>::floats(Dk, Dv, group, true);
}

void LK_EXPORT(delta_net_fp32)(const DeltaNet<float>* a) { run(*a, false); }
void LK_EXPORT(delta_net_bf16)(const DeltaNet<uint16_t>* a) { run(*a, false); }
void LK_EXPORT(delta_net_backward_fp32)(const DeltaNet<float>* a) { run(*a, true); }
void LK_EXPORT(delta_net_backward_bf16)(const DeltaNet<uint16_t>* a) { run(*a, true); }

}  // extern "C"
