// The rotation on the CPU: q and k in one call, token by token, so that a row of the tables serves all heads. fp32
// inside, one rounding. Strides are read, not forced: a view of a fused projection is turned without a copy. The
// result may be the operand. Backward is the same with -sin.
#include "simd.h"

namespace {

using namespace simd;

template <class T>
struct Heads {
    const T* in;
    T* out;
    int64_t number, in_batch, in_token, in_head, out_batch, out_token, out_head;  // strides, of values
};

template <class T>
struct Rotation {
    Heads<T> q, k;
    const float *cos, *sin;  // [1 or B, T, half]
    int64_t B, tokens, table_batch, half, D;
    float sign;  // of sin
};

template <class T>
void rotate_token(const Rotation<T>& a, const Heads<T>& heads, int64_t b, int64_t t) {
    const float *cos = a.cos + b * a.table_batch + t * a.half, *sin = a.sin + b * a.table_batch + t * a.half;
    const Vec sign = fill(a.sign);
    for (int64_t h = 0; h < heads.number; ++h) {
        const T* in = heads.in + b * heads.in_batch + t * heads.in_token + h * heads.in_head;
        T* out = heads.out + b * heads.out_batch + t * heads.out_token + h * heads.out_head;
        vectors(a.half, [&](int64_t i, auto part) {
            const Vec x = load(in + i, part), y = load(in + a.half + i, part);
            const Vec c = load(cos + i, part), s = load(sin + i, part) * sign;
            store(x * c - y * s, out + i, part);
            store(y * c + x * s, out + a.half + i, part);
        });
        const int64_t turned = 2 * a.half;
        if (in != out && turned < a.D)
            std::memcpy(out + turned, in + turned, static_cast<size_t>(a.D - turned) * sizeof(T));
    }
}

template <class T>
void rotate(const Rotation<T>& a) {
    parallel(a.B * a.tokens, (a.q.number + a.k.number) * a.D, [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; ++token) {
            rotate_token(a, a.q, token / a.tokens, token % a.tokens);
            rotate_token(a, a.k, token / a.tokens, token % a.tokens);
        }
    });
}

}  // namespace

extern "C" {

void LK_EXPORT(rope_fp32)(const Rotation<float>* rotation) { rotate(*rotation); }
void LK_EXPORT(rope_bf16)(const Rotation<uint16_t>* rotation) { rotate(*rotation); }

}  // extern "C"
