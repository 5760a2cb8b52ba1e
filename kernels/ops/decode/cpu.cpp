// One decoding step of a whole dense decoder on the CPU: embedding rows in, logits out, one call.
//
// A step reads every weight once and computes two operations per weight read, so memory sets the time and the code
// only has to keep it busy. There is one parallel region for the whole step. Inside it every thread walks the
// layers, and after each of a layer's five stages waits at a barrier that spins:
//
//   1  norm; its share of the rows of q, k, v                                     -> projected
//   2  rotate, store the new key and value; attention of its share of (row, kv head, piece of the context)  -> pieces
//   3  merge the pieces; its share of the rows of o                               -> delta
//   4  x += delta; norm; its share of the rows of gate and up; the activation     -> inner
//   5  its share of the rows of down                                              -> delta
//
// A prompt is the same with T tokens per row of the batch: each weight is read once for all of them. Its keys and
// values are stored in a stage of their own, since later tokens look at earlier ones.
//
// What is O(hidden) (norms, sums, the merge) every thread does for itself, on a copy of its own: that is cheaper
// than a barrier. A thread's share of a matrix is one run of rows, read in memory order; the last rows of a run
// prefetch the first of the thread's next run, which may be in the next stage: the stream goes on over the barrier.
//
// An output is one dot product, summed in one fixed order whatever the number of threads or rows in the batch, and
// attention is cut into pieces by the length of what a row sees alone. So threads and batch size change no bit.
//
// Nothing here is an inline template of the standard library: see simd.h.
#include "ops/decode/dots.h"

#include <math.h>
#include <sched.h>
#include <stdlib.h>

namespace {

using namespace simd;

#if defined(__AVX2__)
// The sums of eight vectors, one per lane.
inline Vec sums(const Vec* a) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4].v, a[5].v), _mm256_hadd_ps(a[6].v, a[7].v));
    return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31))};
}

// e^x to about an ulp, of any x, where that of simd.h ends at 88: e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by its
// Taylor polynomial of degree 7 (the rest is below 6e-9). Below the smallest normal number it is 0; NaN stays NaN.
inline Vec any_exponential(Vec x) {
    const __m256 low = _mm256_set1_ps(-87.33654f);
    const __m256 none = _mm256_cmp_ps(x.v, low, _CMP_LT_OQ);
    const __m256 a = _mm256_max_ps(low, _mm256_min_ps(_mm256_set1_ps(88.37626f), x.v));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(a, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // ln 2 in two parts, the first short enough that n times it is exact
    const __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f),
                                      _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), a));
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    const float rest[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (const float c : rest) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return {_mm256_andnot_ps(none, _mm256_mul_ps(p, _mm256_castsi256_ps(power)))};
}
#else
inline Vec sums(const Vec* a) {
    return lanes([&](int i) {
        const float* v = a[i].v;
        return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    });
}
inline Vec any_exponential(Vec x) {
    return lanes([&](int i) { return expf(x.v[i]); });
}
#endif

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// ---- what Python hands over (cpu.py and operands.py build the same layouts) ------------------------------------

// What an adapter adds to a linear layer: scale B A x. No update: a null A
struct Update {
    const float *A, *B;  // [rank, K], [N, rank]
    int64_t rank;
    double scale;
};

enum Linear { Q, K_, V, O, GATE, UP, DOWN, LINEARS };
enum { EMBEDDING, HEAD };  // in the place of a layer after the last

template <class W>
struct Layer {
    const W *input_norm, *q, *k, *v, *o, *gate, *up, *down, *post_attention_norm, *pre_feedforward_norm,
        *post_feedforward_norm, *q_norm, *k_norm, *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
    int64_t rope;
};

template <class W>
struct Model {
    const W *embedding, *norm, *head;
    const Layer<W>* layers;
    int64_t depth, vocab, hidden, inner, heads, kv_heads, head_dim;
    int64_t activation;  // 0 silu, 1 gelu by tanh, 2 gelu by erf
    const PackedWeight* packed;  // [depth, LINEARS] and those of the embedding and the head, or null
    const Update* updates;       // [adapters, depth, LINEARS]
    int64_t rank;                // the largest
    float eps, norm_offset, embedding_scale, attention_scale, attn_softcap, final_softcap;  // no cap: 0
};

struct Table {
    const float *cos, *sin;  // [B, D / 2]
};

template <class W>
struct Context {
    W *keys, *values;       // [pages, 2^shift, Hk, D]
    int64_t shift, window;  // no window: 0
    int64_t kind;           // which of a row's tables tells its pages
};

constexpr int64_t KINDS = 2;  // of layers: those that see everything, and those with a window

struct Place {
    int64_t position, adapter;    // of a row's first new token; no adapter: -1
    const int64_t* pages[KINDS];  // position p lies in page pages[kind][p >> shift]
};

// ---- the team of threads -------------------------------------------------------------------------------------------

// Every thread's share of [0, SHARES) tells it how many threads there are and which of them it is.
constexpr int64_t SHARES = int64_t{1} << 40;

struct Barrier {
    alignas(64) int64_t arrived = 0;
    alignas(64) int64_t round = 0;

    // Spins until all have arrived, and fetches [next, end) into this core's cache in the meantime.
    void wait(int64_t team, const char* next, const char* end) {
        const int64_t now = __atomic_load_n(&round, __ATOMIC_RELAXED);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == team) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int spins = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == now; ++spins) {
            if (next < end) {
                __builtin_prefetch(next, 0, 2);
                next += 64;
                continue;
            }
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (spins > 4000) sched_yield();  // the one waited for may need this processor
        }
    }
};

// Zeroed memory for one call, handed out in pieces that start on a cache line.
struct Arena {
    float *memory, *at;
    explicit Arena(int64_t floats)
        : memory(static_cast<float*>(aligned_alloc(64, static_cast<size_t>(padded(floats)) * 4))), at(memory) {
        if (!memory) abort();
        std::memset(memory, 0, static_cast<size_t>(padded(floats)) * 4);
    }
    ~Arena() { free(memory); }
    Arena(const Arena&) = delete;
    float* take(int64_t floats) {
        float* start = at;
        at += padded(floats);
        return start;
    }
};

constexpr int64_t TILE = 8;  // positions of the cache that are read together

// The pieces of a context of `count` positions: about 16 of 32 to 256 each.
struct Pieces {
    int64_t size, number;
    explicit Pieces(int64_t count) {
        size = (count + 15) / 16;
        size = size < 32 ? 32 : size > 256 ? 256 : size;
        number = (count + size - 1) / size;
        size = ((count + number - 1) / number + TILE - 1) / TILE * TILE;
        number = (count + size - 1) / size;
    }
};

// ---- the step ------------------------------------------------------------------------------------------------------

template <class W>
struct Step {
    const Model<W>& model;
    const int64_t* ids;          // [B, T], B T below: rows
    const Table* tables;         // one per rope
    const Context<W>* contexts;  // one per layer
    const Place* places;         // one per row of the batch
    float* logits;               // [B, V], of each row's last token
    int64_t rows, tokens;        // B T, T
    int64_t number;              // of pieces, at most
    // shared by the threads; a row starts on a cache line and ends in zeros
    float* projected;     // [rows, (Hq + 2 Hk) D]
    float* pieces;        // [rows, Hq, number, D + 16]: sum of weighted values; largest score, sum of the weights
    float* delta;         // [rows, H]
    float *gate, *inner;  // [rows, I]
    Barrier barrier;
};

// Rows [first, last) of a matrix times the activations: out[b, row], plus a bias.
template <class W>
struct Run {
    Matrix<W> w;
    const W* bias;
    int64_t first, last;
    float* out;
    int64_t stride, linear;
};

// The memory that a thread reads in a stage
struct Stretch {
    const char* start;
    int64_t bytes;
};

// How far ahead of the row that is read another is prefetched, and how much of a stage's matrix is fetched while
// waiting for the other threads, in bytes. PANEL of a matrix are multiplied by eight rows before the next eight come.
constexpr int64_t AHEAD = 2048, WAITING = 1 << 17, PANEL = 1 << 16;

template <class W>
struct Worker {
    Step<W>& step;
    const Model<W>& model;
    const int64_t index, team, rows, T, H, D, group;
    const int64_t wide, attended_wide, inner_wide, projected_wide, head_wide, rank_wide;  // row lengths in memory
    Arena arena;
    float *x, *normed, *attended;  // [rows, ..]: the residual stream, its norm, the output of attention
    float *query, *scores;         // [G, D], [G, 256]
    float *row, *low;              // [H or D], [rank]
    const W* zeros;                // [D]
    float* scales;                 // of two rows in 4 bits
    float* in_order;               // [rows, H, I or Hq D]: activations as rows in 4 bits want them

    Worker(Step<W>& s, int64_t index, int64_t team)
        : step(s), model(s.model), index(index), team(team), rows(s.rows), T(s.tokens), H(s.model.hidden), D(s.model.head_dim),
          group(s.model.heads / s.model.kv_heads), wide(padded(H)), attended_wide(padded(model.heads * D)),
          inner_wide(padded(model.inner)), projected_wide(padded((model.heads + 2 * model.kv_heads) * D)),
          head_wide(padded(D)), rank_wide(padded(model.rank)),
          arena(rows * (2 * wide + attended_wide) + (group + 1) * head_wide + group * 256 + wide + head_wide + rank_wide +
                (model.packed ? 2 * scales_wide() + rows * (longest() + DEALT) : 0)) {
        x = arena.take(rows * wide);
        normed = arena.take(rows * wide);
        attended = arena.take(rows * attended_wide);
        query = arena.take(group * head_wide);
        zeros = reinterpret_cast<W*>(arena.take(head_wide));
        scores = arena.take(group * 256);
        row = arena.take(wide + head_wide);
        low = arena.take(rank_wide);
        scales = model.packed ? arena.take(2 * scales_wide()) : nullptr;
        in_order = model.packed ? arena.take(rows * (longest() + DEALT)) : nullptr;
    }

    int64_t scales_wide() const { return padded(longest() / 32 + 8); }

    // The longest row of a matrix, in memory
    int64_t longest() const {
        const int64_t most = wide > inner_wide ? wide : inner_wide;
        return most > attended_wide ? most : attended_wide;
    }

    // Until all threads are here; `next` is what this one reads afterwards.
    void wait(Stretch next = {nullptr, 0}) {
        if (team == 1) return;
        step.barrier.wait(team, next.start, next.start + smaller(next.bytes, WAITING));
    }

    // The first of this thread's share of n rows; share(n, index + 1) is the end of it.
    int64_t share(int64_t n, int64_t i) const { return i == team ? n : n * i / team / 4 * 4; }

    // ---- small pieces ----

    void rms_norm(const float* a, const W* weight, int64_t n, float* out) const {
        Vec even = fill(0), odd = fill(0);
        for (int64_t i = 0; i < n; i += 16) {  // rows end in zeros
            even = madd(load(a + i), load(a + i), even);
            odd = madd(load(a + i + 8), load(a + i + 8), odd);
        }
        const float scale = 1.0f / sqrtf(sum(even + odd) / static_cast<float>(n) + model.eps);
        const Vec s = fill(scale), offset = fill(model.norm_offset);
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) store(load(a + i) * s * (load(weight + i) + offset), out + i);
        if (i < n) store(load(a + i) * s * (load(weight + i, First{n - i}) + offset), out + i);
    }

    void add(const float* a, float* out) const {
        for (int64_t i = 0; i < H; i += 8) store(load(out + i) + load(a + i), out + i);
    }

    // x += delta, or its norm where the layer has one there
    void add_delta(const W* weight) {
        for (int64_t b = 0; b < rows; ++b) {
            const float* delta = step.delta + b * wide;
            if (weight) rms_norm(delta, weight, H, row);
            add(weight ? row : delta, x + b * wide);
        }
    }

    void norm_x(const W* weight) {
        for (int64_t b = 0; b < rows; ++b) rms_norm(x + b * wide, weight, H, normed + b * wide);
    }

    void embed() {
        const PackedWeight* table = packed(model.depth, EMBEDDING);
        for (int64_t b = 0; b < rows; ++b) {
            if (table) unpack(*table, step.ids[b], H, row);
            float* out = x + b * wide;
            if (table) {
                widen_row(row, out);
            } else {
                widen_row(model.embedding + step.ids[b] * H, out);
            }
        }
    }

    template <class T>
    void widen_row(const T* source, float* out) const {
        const Vec scale = fill(model.embedding_scale);
        int64_t i = 0;
        for (; i + 8 <= H; i += 8) store(load(source + i) * scale, out + i);
        if (i < H) store(load(source + i, First{H - i}) * scale, out + i);
    }

    // ---- matrix times vectors ----

    // Rows [i, i + R) of a run times N rows of a, from the b-th on.
    template <int R, int N>
    void products(const Run<W>& run, const Levels& levels, int64_t i, int64_t b, const float* a, int64_t a_stride,
                  const char* next) const {
        float out[R][N];
        const float* x = a + b * a_stride;
        const int64_t K = run.w.K;
        const PackedWeight* packed = run.w.packed;
        const char* ahead = b == 0 ? ahead_of(run, i, next) : run.w.row(i);
        const int64_t apart = run.w.bytes();
        if (!packed) {
            Row<W> w[R];
            for (int r = 0; r < R; ++r) w[r] = {run.w.dense + (i + r) * K};
            dots<R, N>(w, K, x, a_stride, ahead, apart, out);
        } else if (packed->values) {
            Row<int8_t> w[R];
            for (int r = 0; r < R; ++r) w[r] = {packed->values + (i + r) * K};
            dots<R, N>(w, K, x, a_stride, ahead, apart, out);
            for (int r = 0; r < R; ++r)
                for (int n = 0; n < N; ++n) out[r][n] *= packed->scale[i + r] * (1.0f / 127);
        } else {
            dots_nf4<R, N>(packed->nf4, levels, i, K, x, a_stride, scales, ahead, apart, out);
        }
        for (int r = 0; r < R; ++r) {
            const float bias = run.bias ? widen(run.bias[i + r]) : 0.0f;
            for (int n = 0; n < N; ++n) run.out[(b + n) * run.stride + i + r] = out[r][n] + bias;
        }
    }

    // What is fetched while row i of a run is read; `next` is where the thread will read after the run, or null.
    const char* ahead_of(const Run<W>& run, int64_t i, const char* next) const {
        const int64_t bytes = run.w.bytes(), distance = (AHEAD + bytes - 1) / bytes;  // in rows
        const int64_t over = i + distance - run.last;
        return over < 0 || !next ? run.w.row(over < 0 ? i + distance : i) : next + over * bytes;
    }

    // Rows [first, last) of a run times N rows of a.
    template <int N>
    void panel(const Run<W>& run, const Levels& levels, int64_t first, int64_t last, int64_t b, const float* a,
               int64_t a_stride, const char* next) const {
        int64_t i = first;
        if (N > 1) {  // two rows read the activations once
            for (; i + 2 <= last; i += 2) products<2, N>(run, levels, i, b, a, a_stride, next);
        }
        for (; i < last; ++i) products<1, N>(run, levels, i, b, a, a_stride, next);
    }

    // a [n, K] times the runs. `next` is where the thread will read afterwards.
    void multiply(const Run<W>* runs, int count, const float* a, int64_t a_stride, int64_t n, const char* next) const {
        for (int r = 0; r < count; ++r) {
            const Run<W>& run = runs[r];
            const float* x = a;
            int64_t stride = a_stride;
            if (run.w.in_4_bits()) {
                stride = (run.w.K + DEALT - 1) / DEALT * DEALT;
                for (int64_t b = 0; b < n; ++b) deal(a + b * a_stride, run.w.K, in_order + b * stride);
                x = in_order;
            }
            multiply(run, x, stride, n, r + 1 < count ? runs[r + 1].w.row(runs[r + 1].first) : next);
        }
    }

    // Eight rows of a at a time are multiplied by a panel of the matrix, which a near cache keeps.
    void multiply(const Run<W>& run, const float* a, int64_t a_stride, int64_t n, const char* next) const {
        const Levels levels(run.w.in_4_bits() ? run.w.packed->nf4.table : NO_LEVELS);
        const int64_t together = n <= 8 ? run.last - run.first : 1 + PANEL / run.w.bytes();
        for (int64_t i = run.first; i < run.last; i += together) {
            const int64_t end = smaller(run.last, i + together);
            int64_t b = 0;
            for (; b + 8 <= n; b += 8) panel<8>(run, levels, i, end, b, a, a_stride, next);
            for (; b + 4 <= n; b += 4) panel<4>(run, levels, i, end, b, a, a_stride, next);
            for (; b + 2 <= n; b += 2) panel<2>(run, levels, i, end, b, a, a_stride, next);
            if (b < n) panel<1>(run, levels, i, end, b, a, a_stride, next);
        }
    }

    // The runs of layer l again, of the rows' adapters: out += scale B (A a). A a is short, every thread computes it.
    void adapt(const Run<W>* runs, int count, int64_t l, int64_t K, const float* a, int64_t a_stride) const {
        if (!model.updates) return;
        for (int r = 0; r < count; ++r) {
            for (int64_t b = 0; b < rows; ++b) {
                const int64_t adapter = step.places[b / T].adapter;
                if (adapter < 0) continue;
                const Update& update = model.updates[(adapter * model.depth + l) * LINEARS + runs[r].linear];
                if (update.A) add_update(runs[r], b, update, K, a + b * a_stride);
            }
        }
    }

    void add_update(const Run<W>& run, int64_t b, const Update& update, int64_t K, const float* a) const {
        const int64_t rank = update.rank;
        std::memset(low, 0, static_cast<size_t>(rank_wide) * 4);
        for (int64_t j = 0; j < rank; ++j) {
            float out[1][1];
            const Row<float> w[1] = {{update.A + j * K}};
            dots<1, 1>(w, K, a, K, reinterpret_cast<const char*>(w[0].w + K), 0, out);
            low[j] = out[0][0] * static_cast<float>(update.scale);
        }
        float* out = run.out + b * run.stride;
        for (int64_t i = run.first; i < run.last; i += 8) {
            const int64_t n = smaller(8, run.last - i);
            Vec part[8];
            for (int64_t o = 0; o < 8; ++o) {
                const float* weights = update.B + (i + o) * rank;
                part[o] = fill(0);
                for (int64_t k = 0; o < n && k < rank; k += 8) {
                    const Vec w = rank - k >= 8 ? load(weights + k) : load(weights + k, First{rank - k});
                    part[o] = madd(w, load(low + k), part[o]);
                }
            }
            float found[8];
            store(sums(part), found);
            for (int64_t o = 0; o < n; ++o) out[i + o] += found[o];
        }
    }

    // This thread's share of all rows of w [n, K]
    Run<W> share_of(const W* w, const W* bias, int64_t n, int64_t K, float* out, int64_t stride, int64_t l,
                    int64_t linear) const {
        return {{w, packed(l, linear), K}, bias, share(n, index), share(n, index + 1), out, stride, linear};
    }

    const PackedWeight* packed(int64_t l, int64_t linear) const {
        if (!model.packed) return nullptr;
        const PackedWeight* found = model.packed + l * LINEARS + linear;
        return found->values || found->nf4.codes ? found : nullptr;
    }

    Run<W> o_of(int64_t l) const {
        const Layer<W>& layer = model.layers[l];
        return share_of(layer.o, layer.o_bias, H, model.heads * D, step.delta, wide, l, O);
    }
    Run<W> gate_of(int64_t l) const {
        const Layer<W>& layer = model.layers[l];
        return share_of(layer.gate, layer.gate_bias, model.inner, H, step.gate, inner_wide, l, GATE);
    }
    Run<W> up_of(int64_t l) const {
        const Layer<W>& layer = model.layers[l];
        return share_of(layer.up, layer.up_bias, model.inner, H, step.inner, inner_wide, l, UP);
    }
    Run<W> down_of(int64_t l) const {
        const Layer<W>& layer = model.layers[l];
        return share_of(layer.down, layer.down_bias, H, model.inner, step.delta, wide, l, DOWN);
    }
    Run<W> head_of() const {
        return share_of(model.head, nullptr, model.vocab, H, step.logits, model.vocab, model.depth, HEAD);
    }

    static const char* start_of(const Run<W>& run) { return run.w.row(run.first); }
    static Stretch all_of(const Run<W>& run) { return {start_of(run), (run.last - run.first) * run.w.bytes()}; }

    // The part of rows [first, first + n) of the stacked q, k, v that is this thread's
    void add_part(Run<W>* runs, int& count, const W* w, const W* bias, int64_t first, int64_t n, int64_t all,
                  int64_t l, int64_t linear) const {
        const int64_t from = share(all, index) - first, to = share(all, index + 1) - first;
        const int64_t low = from > 0 ? from : 0, high = smaller(to, n);
        if (low < high)
            runs[count++] = {{w, packed(l, linear), H}, bias, low, high, step.projected + first, projected_wide, linear};
    }

    // ---- stages ----

    int parts(int64_t l, Run<W>* runs) const {
        const Layer<W>& layer = model.layers[l];
        const int64_t q = model.heads * D, k = model.kv_heads * D, all = q + 2 * k;
        int count = 0;
        add_part(runs, count, layer.q, layer.q_bias, 0, q, all, l, Q);
        add_part(runs, count, layer.k, layer.k_bias, q, k, all, l, K_);
        add_part(runs, count, layer.v, layer.v_bias, q + k, k, all, l, V);
        return count;
    }

    void project(const Layer<W>& layer, int64_t l) {
        norm_x(layer.input_norm);
        Run<W> runs[3];
        const int count = parts(l, runs);
        multiply(runs, count, normed, wide, rows, start_of(o_of(l)));
        adapt(runs, count, l, H, normed, wide);
    }

    // One head of `projected`: its norm, if any, and the rotation
    void rotate(const float* from, const W* norm, const Table& table, int64_t b, float* out) const {
        std::memcpy(out, from, static_cast<size_t>(D) * 4);
        // the norm sums over the padding too, where another row's NaN may have been left
        std::memset(out + D, 0, static_cast<size_t>(head_wide - D) * 4);
        if (norm) rms_norm(out, norm, D, out);
        const int64_t half = D / 2;
        const float *cos = table.cos + b * half, *sin = table.sin + b * half;
        for (int64_t j = 0; j < half; ++j) {
            const float first = out[j], second = out[j + half];
            out[j] = first * cos[j] - second * sin[j];
            out[j + half] = second * cos[j] + first * sin[j];
        }
    }

    static void round_to(float value, float* out) { *out = value; }
    static void round_to(float value, uint16_t* out) { *out = bf16_from_float(value); }

    // What row b, a token of a row of the batch, looks at in a layer: positions [first, end), the last its own
    struct Span {
        int64_t first, end;
    };

    static Span span(const Context<W>& context, const Place* places, int64_t b, int64_t T) {
        const int64_t end = places[b / T].position + b % T + 1;
        return {context.window && end > context.window ? end - context.window : 0, end};
    }

    Span span(const Context<W>& context, int64_t b) const { return span(context, step.places, b, T); }

    const int64_t* pages_of(const Context<W>& context, int64_t b) const {
        return step.places[b / T].pages[context.kind];
    }

    // Where position t of a row lies in keys or values: its first head's
    int64_t place_of(const Context<W>& context, const int64_t* pages, int64_t t) const {
        const int64_t slot = (pages[t >> context.shift] << context.shift) + (t & ((int64_t{1} << context.shift) - 1));
        return slot * model.kv_heads * D;
    }

    // TILE positions of one head, from position t on, as they lie in the cache. After `stop` it is a row of zeros: what
    // is in a page there, even NaN, stays out of every sum. TILE positions of `later` are prefetched.
    struct Tile {
        const W* cache;
        const int64_t* pages;
        int64_t t, stop;
    };

    void slots_at(const Context<W>& context, const Tile& now, const Tile& later, const W** out) const {
        for (int64_t i = 0; i < TILE; ++i) {
            out[i] = now.t + i < now.stop ? now.cache + place_of(context, now.pages, now.t + i) : zeros;
            if (later.t + i >= later.stop) continue;
            const char* line = reinterpret_cast<const char*>(later.cache + place_of(context, later.pages, later.t + i));
            for (int64_t at = 0; at < D * static_cast<int64_t>(sizeof(W)); at += 64) __builtin_prefetch(line + at);
        }
    }

    float* piece_of(int64_t b, int64_t head, int64_t piece) const {
        return step.pieces + ((b * model.heads + head) * step.number + piece) * (head_wide + 16);
    }

    // Attention over pieces of the context; whoever has the last piece stores the new key and value.
    void attend(const Layer<W>& layer, const Context<W>& context) {
        const int64_t units = rows * step.number * model.kv_heads, last = units * (index + 1) / team;
        const int64_t apart = step.number * (head_wide + 16);  // from a piece to the next head's
        for (int64_t u = units * index / team; u < last; ++u) {
            const Unit unit = unit_at(u, context), then = unit_at(u + 1 < last ? u + 1 : u, context);
            const int64_t b = unit.row, start = unit.start, stop = unit.stop;
            if (stop <= start) continue;  // this row has no such piece
            if (T == 1 && stop == span(context, b).end) keep(layer, context, b, unit.head);
            const float* heads = step.projected + b * projected_wide + unit.head * group * D;
            for (int64_t g = 0; g < group; ++g)
                rotate(heads + g * D, layer.q_norm, step.tables[layer.rope], b, query + g * head_wide);
            float* out = piece_of(b, unit.head * group, unit.piece);
            const W *keys = context.keys + unit.head * D, *values = context.values + unit.head * D, *slots[TILE];
            const int64_t* pages = pages_of(context, b);
            for (int64_t t = start; t < stop; t += TILE) {
                slots_at(context, {keys, pages, t, stop}, {values, pages, t, stop}, slots);
                float* s = scores + t - start;
                int64_t g = 0;
                for (; g + 3 <= group; g += 3) score<3>(slots, query + g * head_wide, s + g * 256);
                for (; g + 2 <= group; g += 2) score<2>(slots, query + g * head_wide, s + g * 256);
                if (g < group) score<1>(slots, query + g * head_wide, s + g * 256);
            }
            for (int64_t g = 0; g < group; ++g) soften(scores + g * 256, stop - start, out + g * apart);
            const W* next = context.keys + then.head * D;
            const int64_t* next_pages = pages_of(context, then.row);
            for (int64_t t = start; t < stop; t += TILE) {
                slots_at(context, {values, pages, t, stop}, {next, next_pages, then.start + t - start, then.stop}, slots);
                const float* s = scores + t - start;
                int64_t g = 0;
                for (; g + 3 <= group; g += 3) gather<3>(slots, s + g * 256, out + g * apart, apart);
                for (; g + 2 <= group; g += 2) gather<2>(slots, s + g * 256, out + g * apart, apart);
                if (g < group) gather<1>(slots, s + g * 256, out + g * apart, apart);
            }
        }
    }

    // A piece of the context of one row and kv head: positions [start, stop). The first pieces of all rows come first,
    // so that threads share long rows beside short ones.
    struct Unit {
        int64_t row, head, piece, start, stop;
    };

    Unit unit_at(int64_t u, const Context<W>& context) const {
        const int64_t h = u % model.kv_heads, b = u / model.kv_heads % rows, piece = u / model.kv_heads / rows;
        const Span seen = span(context, b);
        const int64_t size = Pieces(seen.end - seen.first).size, start = seen.first + piece * size;
        return {b, h, piece, start, smaller(start + size, seen.end)};
    }

    void keep(const Layer<W>& layer, const Context<W>& context, int64_t b, int64_t h) {
        const float* heads = step.projected + b * projected_wide;
        const float* value = heads + (model.heads + model.kv_heads + h) * D;
        const int64_t at = place_of(context, pages_of(context, b), span(context, b).end - 1) + h * D;
        rotate(heads + (model.heads + h) * D, layer.k_norm, step.tables[layer.rope], b, query);
        for (int64_t d = 0; d < D; ++d) {
            round_to(query[d], context.keys + at + d);
            round_to(value[d], context.values + at + d);
        }
    }

    // A prompt's new keys and values
    void keep_all(const Layer<W>& layer, const Context<W>& context) {
        const int64_t units = rows * model.kv_heads;
        for (int64_t u = units * index / team; u < units * (index + 1) / team; ++u)
            keep(layer, context, u / model.kv_heads, u % model.kv_heads);
    }

    // The products of TILE keys with G queries, scaled: out [G, 256]
    template <int G>
    void score(const W* const* slots, const float* q, float* out) const {
        Vec dot[G][TILE];
        for (int first = 0; first < TILE; first += 4) {  // four keys at a time: the sums stay in registers
            const W* const* four = slots + first;
            Vec part[G][4];
            for (int g = 0; g < G; ++g)
                for (int i = 0; i < 4; ++i) part[g][i] = fill(0);
            int64_t d = 0;
            for (; d + 8 <= D; d += 8) {
                for (int i = 0; i < 4; ++i) {
                    const Vec key = load(four[i] + d);
                    for (int g = 0; g < G; ++g) part[g][i] = madd(key, load(q + g * head_wide + d), part[g][i]);
                }
            }
            for (int i = 0; i < 4 && d < D; ++i) {
                const Vec key = load(four[i] + d, First{D - d});
                for (int g = 0; g < G; ++g) part[g][i] = madd(key, load(q + g * head_wide + d), part[g][i]);
            }
            for (int g = 0; g < G; ++g)
                for (int i = 0; i < 4; ++i) dot[g][first + i] = part[g][i];
        }
        for (int g = 0; g < G; ++g) store(sums(dot[g]) * fill(model.attention_scale), out + g * 256);
    }

    // G pieces += TILE values, weighted
    template <int G>
    void gather(const W* const* slots, const float* weights, float* out, int64_t apart) const {
        int64_t d = 0;
        for (; d + 16 <= D; d += 16) {
            Vec low[G], high[G];
            for (int g = 0; g < G; ++g) low[g] = load(out + g * apart + d), high[g] = load(out + g * apart + d + 8);
            for (int i = 0; i < TILE; ++i) {
                const Vec a = load(slots[i] + d), b = load(slots[i] + d + 8);
                for (int g = 0; g < G; ++g) {
                    const Vec w = fill(weights[g * 256 + i]);
                    low[g] = madd(w, a, low[g]);
                    high[g] = madd(w, b, high[g]);
                }
            }
            for (int g = 0; g < G; ++g) store(low[g], out + g * apart + d), store(high[g], out + g * apart + d + 8);
        }
        for (; d < D; d += 8) {
            for (int g = 0; g < G; ++g) {
                Vec all = load(out + g * apart + d);
                for (int i = 0; i < TILE; ++i) {
                    const Vec value = D - d >= 8 ? load(slots[i] + d) : load(slots[i] + d, First{D - d});
                    all = madd(fill(weights[g * 256 + i]), value, all);
                }
                store(all, out + g * apart + d);
            }
        }
    }

    // n scores to exponentials below the piece's largest; those after the end to 0.
    void soften(float* s, int64_t n, float* piece) const {
        const int64_t whole = (n + TILE - 1) / TILE * TILE;
        const float cap = model.attn_softcap;
        if (cap != 0) {
            for (int64_t i = 0; i < n; ++i) s[i] = cap * tanhf(s[i] / cap);
        }
        for (int64_t i = n; i < whole; ++i) s[i] = -HUGE_VALF;
        Vec top = load(s);
        for (int64_t i = 8; i < whole; i += 8) top = larger(top, load(s + i));
        const float most = largest(top);
        const Vec base = fill(most);
        Vec total = fill(0);
        for (int64_t i = 0; i < whole; i += 8) {
            const Vec e = any_exponential(load(s + i) - base);
            store(e, s + i);
            total = total + e;
        }
        std::memset(piece, 0, static_cast<size_t>(head_wide) * 4);
        piece[head_wide] = most;
        piece[head_wide + 1] = sum(total);
    }

    // attended[b, head] = the pieces' sums over the pieces' totals, all relative to the largest score
    void merge(const Context<W>& context) {
        for (int64_t b = 0; b < rows; ++b) {
            const Span seen = span(context, b);
            const int64_t number = Pieces(seen.end - seen.first).number;
            for (int64_t head = 0; head < model.heads; ++head) {
                const float* first = piece_of(b, head, 0);
                float most = -HUGE_VALF, total = 0;
                for (int64_t p = 0; p < number; ++p) {
                    const float m = first[p * (head_wide + 16) + head_wide];
                    most = m > most ? m : most;
                }
                std::memset(row, 0, static_cast<size_t>(head_wide) * 4);
                for (int64_t p = 0; p < number; ++p) {
                    const float* piece = first + p * (head_wide + 16);
                    const float weight = expf(piece[head_wide] - most);
                    total += weight * piece[head_wide + 1];
                    const Vec w = fill(weight);
                    for (int64_t d = 0; d < D; d += 8) store(madd(w, load(piece + d), load(row + d)), row + d);
                }
                for (int64_t d = 0; d < D; d += 8) store(load(row + d) / fill(total), row + d);
                std::memcpy(attended + b * attended_wide + head * D, row, static_cast<size_t>(D) * 4);
            }
        }
    }

    Vec activate(Vec a) const {
        if (model.activation == 2) {  // a Phi(a)
            float v[8];
            store(a, v);
            for (float& e : v) e = 0.5f * e * erfcf(e * -0.70710678f);
            return load(v);
        }
        // silu: a sigmoid(a); gelu by tanh: 0.5 a (1 + tanh u) = a sigmoid(2 u)
        const Vec u = model.activation == 0 ? a : a * fill(1.59576912f) * madd(a * a, fill(0.044715f), fill(1));
        return a / (fill(1) + any_exponential(fill(0) - u));
    }

    void feed(int64_t l) {
        const Run<W> runs[] = {gate_of(l), up_of(l)};
        multiply(runs, 2, normed, wide, rows, start_of(down_of(l)));
        adapt(runs, 2, l, H, normed, wide);
        for (int64_t b = 0; b < rows; ++b) {
            const float* gate = step.gate + b * inner_wide;
            float* inner = step.inner + b * inner_wide;
            int64_t i = runs[0].first;
            for (; i + 8 <= runs[0].last; i += 8) store(activate(load(gate + i)) * load(inner + i), inner + i);
            if (i < runs[0].last) {  // the next values are another thread's
                const int64_t n = runs[0].last - i;
                float v[8];
                store(activate(load(gate + i, First{n})) * load(inner + i, First{n}), v);
                std::memcpy(inner + i, v, static_cast<size_t>(n) * 4);
            }
        }
    }

    void predict() {
        const int64_t batch = rows / T;
        for (int64_t b = 0; b < batch; ++b)  // of the last tokens only
            rms_norm(x + (b * T + T - 1) * wide, model.norm, H, normed + b * wide);
        const Run<W> run = head_of();
        multiply(&run, 1, normed, wide, batch, nullptr);
        const float cap = model.final_softcap;
        if (cap == 0) return;
        for (int64_t b = 0; b < batch; ++b) {
            float* logits = step.logits + b * model.vocab;
            for (int64_t i = run.first; i < run.last; ++i) logits[i] = cap * tanhf(logits[i] / cap);
        }
    }

    void run() {
        embed();
        for (int64_t l = 0; l < model.depth; ++l) {
            const Layer<W>& layer = model.layers[l];
            project(layer, l);
            wait();
            if (T > 1) {
                keep_all(layer, step.contexts[l]);
                wait();
            }
            attend(layer, step.contexts[l]);
            const Run<W> o = o_of(l), gate = gate_of(l), down = down_of(l);
            wait(all_of(o));
            merge(step.contexts[l]);
            multiply(&o, 1, attended, attended_wide, rows, start_of(gate));
            adapt(&o, 1, l, model.heads * D, attended, attended_wide);
            wait(all_of(gate));
            const bool sandwich = layer.pre_feedforward_norm;
            add_delta(sandwich ? layer.post_attention_norm : nullptr);
            norm_x(sandwich ? layer.pre_feedforward_norm : layer.post_attention_norm);
            feed(l);
            wait(all_of(down));
            Run<W> next[3] = {head_of()};
            if (l + 1 < model.depth) parts(l + 1, next);
            multiply(&down, 1, step.inner, inner_wide, rows, start_of(next[0]));
            adapt(&down, 1, l, model.inner, step.inner, inner_wide);
            wait(all_of(next[0]));
            add_delta(layer.post_feedforward_norm);
        }
        predict();
    }
};

template <class W>
void run_share(void* data, int64_t first, int64_t last) {
    Step<W>& step = *static_cast<Step<W>*>(data);
    // shares are SHARES / team rounded up, the last one less: both round to the same team, for any team that exists
    const int64_t size = last - first, team = (SHARES + size / 2) / size;
    const int64_t index = (first + SHARES / team / 2) / (SHARES / team);
    Worker<W>(step, index, team).run();
}

template <class W>
void decode(const Model<W>& model, const int64_t* ids, const Table* tables, const Context<W>* contexts,
            const Place* places, float* logits, int64_t batch, int64_t tokens) {
    int64_t number = 1;
    for (int64_t l = 0; l < model.depth; ++l) {
        for (int64_t b = 0; b < batch * tokens; ++b) {
            const auto seen = Worker<W>::span(contexts[l], places, b, tokens);
            const int64_t n = Pieces(seen.end - seen.first).number;
            number = n > number ? n : number;
        }
    }
    const int64_t projected = padded((model.heads + 2 * model.kv_heads) * model.head_dim);
    const int64_t pieces = model.heads * number * (padded(model.head_dim) + 16);
    const int64_t hidden = padded(model.hidden), inner = padded(model.inner);
    const int64_t rows = batch * tokens;
    Arena arena(rows * (projected + padded(pieces) + hidden + 2 * inner));
    Step<W> step{model, ids, tables, contexts, places, logits, rows, tokens, number, nullptr, nullptr, nullptr, nullptr, nullptr, {}};
    step.projected = arena.take(rows * projected);
    step.pieces = arena.take(rows * pieces);
    step.delta = arena.take(rows * hidden);
    step.gate = arena.take(rows * inner);
    step.inner = arena.take(rows * inner);
    lk_team(SHARES, run_share<W>, &step);
}

}  // namespace

extern "C" {

void LK_EXPORT(decode_fp32)(const Model<float>* model, const int64_t* ids, const Table* tables,
                            const Context<float>* contexts, const Place* places, float* logits, int64_t batch,
                            int64_t tokens) {
    decode(*model, ids, tables, contexts, places, logits, batch, tokens);
}

void LK_EXPORT(decode_bf16)(const Model<uint16_t>* model, const int64_t* ids, const Table* tables,
                            const Context<uint16_t>* contexts, const Place* places, float* logits, int64_t batch,
                            int64_t tokens) {
    decode(*model, ids, tables, contexts, places, logits, batch, tokens);
}

}  // extern "C"
