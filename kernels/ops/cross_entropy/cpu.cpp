// Cross-entropy on the CPU, a row of logits at a time, fp32 inside; rows may lie apart.
//
// Forward walks over the row in pieces that stay in the nearest cache: the largest value of a piece, then the sum of
// exp(z - m) for the largest m so far; what was summed before is scaled when m grows. So memory is read once. The sums
// of the pieces are added in double precision. Backward, exp(z - lse), may run right after it, while the row lies in
// the second cache, and over the logits.
//
// exp(z - m) is 2^(z LOG2E - M), a multiply-add and fewer steps than exp. M is m LOG2E rounded to fp32, one number for
// all of the sum, so that its rounding can be undone in double precision: m = M / LOG2E from then on. Likewise lse.
//
// A soft cap grows with its argument: the largest value is capped, not the largest of the capped values found.
//
// The weight of dynamic fine-tuning, the label's probability, scales loss and gradient of the row.
//
// The entropy comes from the same pass. With e_i = 2^(x_i - M) and s their sum, the probabilities are p_i = e_i / s, and
// -sum(p_i log p_i) = log(s) - log(2) sum(e_i (x_i - M)) / s: two terms of which none is negative.
//
// A row is one thread's, and its pieces depend on V alone: the threads change no bit.
#define LORAKIT_ANY_LANES
#include "simd.h"

#include <math.h>

namespace {

using namespace simd;

constexpr int64_t PIECE = 4096;  // values: 16 KB in fp32, of a first cache of 32

template <class T>
struct LogitRows {
    const T* logits;        // [N, V]
    const int64_t* labels;  // [N], each in [0, V) or ignored
    float *loss, *lse;      // [N]; loss null: lse is read
    float *right, *entropy;  // [N] or null: 1 if the label is the likeliest word, the first of equals; else 0
    T* gradient;            // [N, V] or null; may be the logits
    const float* scale;     // of the gradient
    int64_t stride, gradient_stride, N, V, ignored, dft;
    float cap, smoothing, z_loss;  // no cap: 0
};

template <bool CAPPED>
inline Vec capped(Vec x, float cap, float inverse) {
    return CAPPED ? fill(cap) * tanh(x * fill(inverse)) : x;
}

template <class T>
float value_at(const T* x) {
    float value;
    store(load(x, First{1}), &value, First{1});
    return value;
}

template <class T>
float largest_of(const T* x, int64_t count, float none) {
    return largest(running(count, fill(none), [&](int64_t i, auto part, Vec found) {
        return larger(only(load(x + i, part), part, none), found);
    }));
}

template <bool CAPPED, bool TELLS, class T>
void forward_row(const LogitRows<T>& a, int64_t row) {
    const T* x = a.logits + row * a.stride;
    const float inverse = 1 / a.cap, none = -__builtin_inff();
    const Vec log2e = fill(LOG2E), lowest = fill(-1e4f);  // 2^lowest is 0, and 0 * -inf would be none
    float M = none, best = none;
    double exponentials = 0, weighted = 0, values = 0;
    for (int64_t start = 0; start < a.V; start += PIECE) {
        const T* piece = x + start;
        const int64_t count = smaller(PIECE, a.V - start);
        const float top = largest_of(piece, count, none);
        if (TELLS && top > best) best = top;
        float next;
        store(capped<CAPPED>(fill(top), a.cap, inverse) * log2e, &next, First{1});
        if (next > M) {
            const double grown = static_cast<double>(M) - static_cast<double>(next), factor = exp2(grown);
            if (TELLS && exponentials > 0) weighted = (weighted + exponentials * grown) * factor;
            exponentials *= factor;
            M = next;
        }
        const Vec below = fill(M == none ? 0 : -M);  // so far nothing but -inf
        Vec products = fill(0);
        exponentials += sum(running(count, fill(0), [&](int64_t i, auto part, Vec sum) {
            const Vec z = capped<CAPPED>(load(piece + i, part), a.cap, inverse), power = madd(z, log2e, below);
            const Vec e = only(exponential2(power), part, 0);
            if (TELLS) products = madd(e, larger(power, lowest), products);
            return sum + e;
        }));
        if (TELLS) weighted += sum(products);
        if (a.smoothing != 0)
            values += sum(running(count, fill(0), [&](int64_t i, auto part, Vec sum) {
                return sum + capped<CAPPED>(load(piece + i, part), a.cap, inverse);
            }));
    }
    const int64_t label = a.labels[row];
    float chosen;
    store(capped<CAPPED>(load(x + label, First{1}), a.cap, inverse), &chosen, First{1});
    const double lse = M / static_cast<double>(LOG2E) + log(exponentials);
    const double weight = a.dft ? exp(chosen - lse) : 1;
    a.lse[row] = static_cast<float>(lse);
    a.loss[row] =
        static_cast<float>(weight * (lse - (1 - static_cast<double>(a.smoothing)) * chosen -
                                     a.smoothing * values / static_cast<double>(a.V) + a.z_loss * lse * lse));
    if (!TELLS) return;
    const float of_label = value_at(x + label);
    a.right[row] = of_label == best && (label == 0 || largest_of(x, label, none) < best) ? 1 : 0;
    a.entropy[row] = static_cast<float>(log(exponentials) - weighted / exponentials / static_cast<double>(LOG2E));
}

// a' (e^(z - lse) factor - spread), the label's share aside
template <bool CAPPED, class T>
void backward_row(const LogitRows<T>& a, int64_t row) {
    const T* x = a.logits + row * a.stride;
    T* out = a.gradient + row * a.gradient_stride;
    const int64_t label = a.labels[row];
    const Vec chosen = load(x + label, First{1});  // before it is overwritten
    const float inverse = 1 / a.cap, at = a.lse[row];
    float likely;
    store(capped<CAPPED>(chosen, a.cap, inverse), &likely, First{1});
    const float scale = a.dft ? *a.scale * expf(likely - at) : *a.scale;
    const float M = at * LOG2E;
    const double rounding = M - at * static_cast<double>(LOG2E);
    const Vec log2e = fill(LOG2E), below = fill(-M);
    const Vec factor = fill(scale * (1 + 2 * a.z_loss * at) * static_cast<float>(exp2(rounding)));
    const Vec spread = fill(scale * a.smoothing / static_cast<float>(a.V));
    const auto gradient = [&](Vec x, Vec more) {
        const Vec z = capped<CAPPED>(x, a.cap, inverse);
        const Vec g = exponential2(madd(z, log2e, below)) * factor - (spread + more);
        if (!CAPPED) return g;
        const Vec part = z * fill(inverse);
        return g * (fill(1) - part * part);
    };
    vectors(a.V, [&](int64_t i, auto part) { store(gradient(load(x + i, part), fill(0)), out + i, part); });
    store(gradient(chosen, fill(scale * (1 - a.smoothing))), out + label, First{1});
}

template <bool CAPPED, class T>
void rows(const LogitRows<T>& a) {
    parallel(a.N, a.V, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const bool ignored = a.labels[row] == a.ignored;
            if (a.loss && ignored) a.loss[row] = a.lse[row] = 0;
            if (a.right && ignored) a.right[row] = a.entropy[row] = 0;
            if (a.loss && !ignored) a.right ? forward_row<CAPPED, true>(a, row) : forward_row<CAPPED, false>(a, row);
            if (a.gradient && ignored)
                std::memset(a.gradient + row * a.gradient_stride, 0, static_cast<size_t>(a.V) * sizeof(T));
            if (a.gradient && !ignored) backward_row<CAPPED>(a, row);
        }
    });
}

template <class T>
void cross_entropy(const LogitRows<T>& a) {
    a.cap != 0 ? rows<true>(a) : rows<false>(a);
}

}  // namespace

extern "C" {

void LK_EXPORT(cross_entropy_fp32)(const LogitRows<float>* rows) { cross_entropy(*rows); }
void LK_EXPORT(cross_entropy_bf16)(const LogitRows<uint16_t>* rows) { cross_entropy(*rows); }

}  // extern "C"
