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
#include "ops/nf4/packed.h"
#include "simd.h"

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

// Eight whole numbers of a byte, or the first of them, the rest 0.
#if defined(__AVX2__)
inline Vec load(const int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}
#else
inline Vec load(const int8_t* p) {
    return lanes([&](int i) { return static_cast<float>(p[i]); });
}
#endif
inline Vec load(const int8_t* p, First part) {
    int8_t padded[8] = {};
    std::memcpy(padded, p, static_cast<size_t>(part.count));
    return load(padded);
}
using simd::load;

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// ---- what Python hands over (cpu.py and operands.py build the same layouts) ------------------------------------

// What an adapter adds to a linear layer: scale B A x. No update: a null A
struct Update {
    const float *A, *B;  // [rank, K], [N, rank]
    int64_t rank;
    double scale;
};

// The weight of a linear layer in 4 bits or in 8, with one scale a row; null codes and values: it is dense
struct PackedWeight {
    PackedNF4 nf4;
    const int8_t* values;
    const float* scale;
};

enum Linear { Q, K_, V, O, GATE, UP, DOWN, LINEARS, NONE = -1 };

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
    const PackedWeight* packed;  // [depth, LINEARS], or null
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

// Rows [first, last) of a matrix w [.., K] times the activations: out[b, row], plus a bias.
template <class W>
struct Run {
    const W *w, *bias;
    int64_t first, last;
    float* out;
    int64_t stride;
    Linear linear;
    const PackedWeight* packed;  // in the place of w
};

// How far ahead of the row that is read another is prefetched, and how much of a stage's matrix is fetched while
// waiting for the other threads, in bytes.
constexpr int64_t AHEAD = 2048, WAITING = 1 << 17;

// A row of w times N rows of x. Every product is summed in the same order: two vectors take turns. The row at
// `ahead` is prefetched, a bf16 line twice: once per line, with the loop unrolled further, was measurably slower.
template <int N, class W>
inline void dots(const W* w, int64_t K, const float* x, int64_t x_stride, const W* ahead, float (&out)[N]) {
    Vec part[N][2];
    for (int n = 0; n < N; ++n) part[n][0] = part[n][1] = fill(0);
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
        if (ahead) __builtin_prefetch(ahead + k);
        const Vec a = load(w + k), b = load(w + k + 8);
        for (int n = 0; n < N; ++n) {
            part[n][0] = madd(a, load(x + n * x_stride + k), part[n][0]);
            part[n][1] = madd(b, load(x + n * x_stride + k + 8), part[n][1]);
        }
    }
    if (k < K) {
        const Vec a = K - k >= 8 ? load(w + k) : load(w + k, First{K - k});
        const Vec b = K - k > 8 ? load(w + k + 8, First{K - k - 8}) : fill(0);
        for (int n = 0; n < N; ++n) {
            part[n][0] = madd(a, load(x + n * x_stride + k), part[n][0]);
            part[n][1] = madd(b, load(x + n * x_stride + k + 8), part[n][1]);
        }
    }
    for (int n = 0; n < N; ++n) out[n] = sum(part[n][0] + part[n][1]);
}

#if defined(__AVX512F__)
// The same for row i of a matrix in 4 bits: a sum of each block's unscaled levels, times the block's scale.
template <int N>
inline void dots_nf4(const PackedNF4& w, int64_t i, int64_t K, const float* x, int64_t x_stride, float (&out)[N]) {
    const __m512 levels = _mm512_loadu_ps(w.table);
    // two lanes of 32 bits to a byte: its higher code in the even lane, its lower one in the odd; 0x80 gives a zero
    const __m512i low = _mm512_add_epi32(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                                         _mm512_set1_epi32(static_cast<int>(0x80808000u)));
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8)), shift = _mm512_set1_epi64(4);
    const int64_t block = w.block, first = i * K / block;
    __m512 total[N];
    for (int n = 0; n < N; ++n) total[n] = _mm512_setzero_ps();
    for (int64_t b = 0; b < K / block; ++b) {
        const uint8_t* codes = w.codes + (first + b) * block / 2;
        const float* at = x + b * block;
        __m512 even[N], odd[N];
        for (int n = 0; n < N; ++n) even[n] = odd[n] = _mm512_setzero_ps();
        for (int64_t k = 0; k < block; k += 32) {
            const __m512 v = _mm512_permutexvar_ps(_mm512_srlv_epi32(spread(codes + k / 2, low), shift), levels);
            const __m512 u = _mm512_permutexvar_ps(_mm512_srlv_epi32(spread(codes + k / 2, high), shift), levels);
            for (int n = 0; n < N; ++n) {
                even[n] = _mm512_fmadd_ps(v, _mm512_loadu_ps(at + n * x_stride + k), even[n]);
                odd[n] = _mm512_fmadd_ps(u, _mm512_loadu_ps(at + n * x_stride + k + 16), odd[n]);
            }
        }
        const __m512 scale = _mm512_set1_ps(scale_of(w, first + b));
        for (int n = 0; n < N; ++n) total[n] = _mm512_fmadd_ps(_mm512_add_ps(even[n], odd[n]), scale, total[n]);
    }
    for (int n = 0; n < N; ++n) out[n] = _mm512_reduce_add_ps(total[n]);
}
#endif

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
    float* dense;                  // [H, I or Hq D], a row of a packed matrix

    Worker(Step<W>& s, int64_t index, int64_t team)
        : step(s), model(s.model), index(index), team(team), rows(s.rows), T(s.tokens), H(s.model.hidden), D(s.model.head_dim),
          group(s.model.heads / s.model.kv_heads), wide(padded(H)), attended_wide(padded(model.heads * D)),
          inner_wide(padded(model.inner)), projected_wide(padded((model.heads + 2 * model.kv_heads) * D)),
          head_wide(padded(D)), rank_wide(padded(model.rank)),
          arena(rows * (2 * wide + attended_wide) + (group + 1) * head_wide + group * 256 + wide + head_wide + rank_wide +
                (model.packed ? wide + inner_wide + attended_wide : 0)) {
        x = arena.take(rows * wide);
        normed = arena.take(rows * wide);
        attended = arena.take(rows * attended_wide);
        query = arena.take(group * head_wide);
        zeros = reinterpret_cast<W*>(arena.take(head_wide));
        scores = arena.take(group * 256);
        row = arena.take(wide + head_wide);
        low = arena.take(rank_wide);
        dense = model.packed ? arena.take(wide + inner_wide + attended_wide) : nullptr;
    }

    // Until all threads are here; `rows` rows of K at `next` are what this one reads afterwards.
    void wait(const W* next, int64_t rows, int64_t K) {
        if (team == 1) return;
        const char* start = reinterpret_cast<const char*>(next);
        const int64_t bytes = smaller(rows * K * static_cast<int64_t>(sizeof(W)), WAITING);
        step.barrier.wait(team, start, next ? start + bytes : start);
    }

    int64_t length(int64_t n) const { return share(n, index + 1) - share(n, index); }

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
        for (int64_t b = 0; b < rows; ++b) {
            const W* source = model.embedding + step.ids[b] * H;
            float* out = x + b * wide;
            const Vec scale = fill(model.embedding_scale);
            int64_t i = 0;
            for (; i + 8 <= H; i += 8) store(load(source + i) * scale, out + i);
            if (i < H) store(load(source + i, First{H - i}) * scale, out + i);
        }
    }

    // ---- matrix times vectors ----

    template <int N>
    void products(const Run<W>& run, int64_t i, int64_t b, int64_t K, const float* a, int64_t a_stride,
                  const W* ahead) const {
        float out[N];
        const float* x = a + b * a_stride;
        if (!run.packed) {
            dots<N>(run.w + i * K, K, x, a_stride, ahead, out);
        } else if (run.packed->values) {
            dots<N>(run.packed->values + i * K, K, x, a_stride, static_cast<const int8_t*>(nullptr), out);
            for (int n = 0; n < N; ++n) out[n] *= run.packed->scale[i] * (1.0f / 127);
        } else {
#if defined(__AVX512F__)
            dots_nf4<N>(run.packed->nf4, i, K, x, a_stride, out);
#else
            dots<N>(dense, K, x, a_stride, static_cast<const float*>(nullptr), out);
#endif
        }
        const float bias = run.bias ? widen(run.bias[i]) : 0.0f;
        for (int n = 0; n < N; ++n) run.out[(b + n) * run.stride + i] = out[n] + bias;
    }

    // One row of the matrix for all n rows of a: it stays in the nearest cache.
    void rows_of_batch(const Run<W>& run, int64_t i, int64_t K, const float* a, int64_t a_stride, int64_t n,
                       const W* ahead) const {
#if !defined(__AVX512F__)
        if (run.packed && !run.packed->values) unpack(run.packed->nf4, i, K);
#endif
        int64_t b = 0;
        for (; b + 4 <= n; b += 4, ahead = nullptr) products<4>(run, i, b, K, a, a_stride, ahead);
        for (; b + 2 <= n; b += 2, ahead = nullptr) products<2>(run, i, b, K, a, a_stride, ahead);
        if (b < n) products<1>(run, i, b, K, a, a_stride, ahead);
    }

#if !defined(__AVX512F__)
    void unpack(const PackedNF4& w, int64_t i, int64_t K) const {
        const Decoder<float> decode(w);
        const int64_t size = w.block, first = i * K / size;
        for (int64_t b = 0; b < K / size; ++b) decode(first + b, scale_of(w, first + b), size, dense + b * size);
    }
#endif

    static const W* row_of(const W* w, int64_t i, int64_t K) { return w ? w + i * K : nullptr; }

    // a [n, K] times the runs. `next` is where the thread will read afterwards.
    void multiply(const Run<W>* runs, int count, int64_t K, const float* a, int64_t a_stride, int64_t n,
                  const W* next) const {
        const int64_t distance = (AHEAD / static_cast<int64_t>(sizeof(W)) + K - 1) / K;  // in rows
        for (int r = 0; r < count; ++r) {
            const Run<W>& run = runs[r];
            const W* then = r + 1 < count ? row_of(runs[r + 1].w, runs[r + 1].first, K) : next;
            for (int64_t i = run.first; i < run.last; ++i) {
                const int64_t over = i + distance - run.last;
                const W* ahead = over < 0 ? row_of(run.w, i + distance, K) : then ? then + over * K : nullptr;
                rows_of_batch(run, i, K, a, a_stride, n, ahead);
            }
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
            float out[1];
            dots<1>(update.A + j * K, K, a, K, static_cast<const float*>(nullptr), out);
            low[j] = out[0] * static_cast<float>(update.scale);
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
    Run<W> share_of(const W* w, const W* bias, int64_t n, float* out, int64_t stride, int64_t l, Linear linear) const {
        return {w, bias, share(n, index), share(n, index + 1), out, stride, linear, packed(l, linear)};
    }

    const PackedWeight* packed(int64_t l, Linear linear) const {
        if (!model.packed || linear == NONE) return nullptr;
        const PackedWeight* found = model.packed + l * LINEARS + linear;
        return found->values || found->nf4.codes ? found : nullptr;
    }

    const W* start_of(const W* w, int64_t n, int64_t K) const { return row_of(w, share(n, index), K); }

    // The part of rows [first, first + n) of the stacked q, k, v that is this thread's
    void add_part(Run<W>* runs, int& count, const W* w, const W* bias, int64_t first, int64_t n, int64_t all,
                  int64_t l, Linear linear) const {
        const int64_t from = share(all, index) - first, to = share(all, index + 1) - first;
        const int64_t low = from > 0 ? from : 0, high = smaller(to, n);
        if (low < high) runs[count++] = {w, bias, low, high, step.projected + first, projected_wide, linear, packed(l, linear)};
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
        multiply(runs, count, H, normed, wide, rows, start_of(layer.o, H, model.heads * D));
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

    void feed(const Layer<W>& layer, int64_t l) {
        const Run<W> runs[] = {share_of(layer.gate, layer.gate_bias, model.inner, step.gate, inner_wide, l, GATE),
                               share_of(layer.up, layer.up_bias, model.inner, step.inner, inner_wide, l, UP)};
        multiply(runs, 2, H, normed, wide, rows, start_of(layer.down, H, model.inner));
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
        const Run<W> run = share_of(model.head, nullptr, model.vocab, step.logits, model.vocab, 0, NONE);
        multiply(&run, 1, H, normed, wide, batch, nullptr);
        const float cap = model.final_softcap;
        if (cap == 0) return;
        for (int64_t b = 0; b < batch; ++b) {
            float* logits = step.logits + b * model.vocab;
            for (int64_t i = run.first; i < run.last; ++i) logits[i] = cap * tanhf(logits[i] / cap);
        }
    }

    void run() {
        embed();
        const int64_t I = model.inner, wide_q = model.heads * D;
        for (int64_t l = 0; l < model.depth; ++l) {
            const Layer<W>& layer = model.layers[l];
            project(layer, l);
            wait(nullptr, 0, 0);
            if (T > 1) {
                keep_all(layer, step.contexts[l]);
                wait(nullptr, 0, 0);
            }
            attend(layer, step.contexts[l]);
            wait(start_of(layer.o, H, wide_q), length(H), wide_q);
            merge(step.contexts[l]);
            const Run<W> o = share_of(layer.o, layer.o_bias, H, step.delta, wide, l, O);
            multiply(&o, 1, wide_q, attended, attended_wide, rows, start_of(layer.gate, I, H));
            adapt(&o, 1, l, wide_q, attended, attended_wide);
            wait(start_of(layer.gate, I, H), length(I), H);
            const bool sandwich = layer.pre_feedforward_norm;
            add_delta(sandwich ? layer.post_attention_norm : nullptr);
            norm_x(sandwich ? layer.pre_feedforward_norm : layer.post_attention_norm);
            feed(layer, l);
            wait(start_of(layer.down, H, I), length(H), I);
            const Run<W> down = share_of(layer.down, layer.down_bias, H, step.delta, wide, l, DOWN);
            Run<W> next[3] = {share_of(model.head, nullptr, model.vocab, nullptr, 0, 0, NONE)};
            if (l + 1 < model.depth) parts(l + 1, next);
            const W* start = row_of(next[0].w, next[0].first, H);
            multiply(&down, 1, I, step.inner, inner_wide, rows, start);
            adapt(&down, 1, l, I, step.inner, inner_wide);
            wait(start, next[0].last - next[0].first, H);
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
