// RMSNorm of one row, forward and backward: what the norms and the rotation of normalized heads share.
#pragma once
#define LORAKIT_ANY_LANES
#include "simd.h"

#include <math.h>

namespace {
namespace simd {

template <class T>
inline Running squares(const T* x, int64_t H) {
    return running(H, fill(0), [&](int64_t i, auto part, Vec sum) {
        const Vec v = load(x + i, part);
        return madd(v, v, sum);
    });
}

// 1 / sqrt(mean(x^2) + eps)
inline float reciprocal_rms(const Running& squares, int64_t H, float eps) {
    const double mean = static_cast<double>(sum(squares)) / static_cast<double>(H);
    return static_cast<float>(1 / sqrt(mean + static_cast<double>(eps)));
}

// y = (offset + w) x rstd, a value of T; llama: x rstd is rounded to T first
template <class T, class Y>
inline void normalize(const T* x, const T* w, float rstd, float offset, bool llama, int64_t H, Y* y) {
    const Vec scale = fill(rstd), shift = fill(offset);
    vectors(H, [&](int64_t i, auto part) {
        const Vec normal = load(x + i, part) * scale;
        const Vec scaled = (llama ? rounded<T>(normal) : normal) * (shift + load(w + i, part));
        store(sizeof(Y) > sizeof(T) ? rounded<T>(scaled) : scaled, y + i, part);
    });
}

// dx = rstd (g - x^ mean(g x^)) + more for g = dy (offset + w), x^ = x rstd; more may be null.
template <class D, class T>
inline void normalize_backward(const D* dy, const T* x, const T* w, const T* more, float rstd, float offset, int64_t H,
                               T* dx) {
    const Vec scale = fill(rstd), shift = fill(offset);
    const Running products = running(H, fill(0), [&](int64_t i, auto part, Vec sum) {
        return madd(load(dy + i, part) * (shift + load(w + i, part)), load(x + i, part) * scale, sum);
    });
    const Vec mean = fill(sum(products) / static_cast<float>(H));
    vectors(H, [&](int64_t i, auto part) {
        const Vec g = load(dy + i, part) * (shift + load(w + i, part));
        Vec d = scale * (g - load(x + i, part) * scale * mean);
        if (more) d = d + load(more + i, part);
        store(d, dx + i, part);
    });
}

}  // namespace simd
}  // namespace
