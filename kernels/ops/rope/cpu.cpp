// The rotation on the CPU: q and k in one call, token by token, so that a row of the tables serves all heads. fp32
// inside, one rounding. Strides are read, not forced: a view of a fused projection is turned without a copy. The
// result may be the operand. Backward is the same with -sin.
//
// With the norms of the heads a head is normalized, rounded and turned while it lies in the nearest cache; forward has
// the bits of the two ops. Backward reads q and k again, and computes their statistics again. Those of a few heads
// come first: each is a chain of sums, a root and divisions, and the processor works on several side by side.
#include "../rms_norm/row.h"

namespace {

using namespace simd;

constexpr int64_t WIDEST = 1024;  // normalized head; as in __init__.py
constexpr int64_t GROUP = 4;      // heads whose statistics come first

struct Strides {
    int64_t batch, token, head;  // of values
};

template <class T>
struct Heads {
    const T *in, *x, *w;  // x: q or k before the norm, for its backward, or null; w [D]: the norm's weight, or null
    T* out;
    int64_t number;
    Strides of_in, of_x, of_out;
};

template <class T>
struct Rotation {
    Heads<T> q, k;
    const float *cos, *sin;  // [1 or B, T, half]
    int64_t B, tokens, table_batch, half, D, llama;
    float sign, eps, offset;  // sign: of sin
};

struct Tables {
    const float *cos, *sin;
    int64_t half;
    float sign;
};

template <class In, class Out>
void turn(const Tables& t, const In* in, Out* out) {
    const Vec sign = fill(t.sign);
    vectors(t.half, [&](int64_t i, auto part) {
        const Vec x = load(in + i, part), y = load(in + t.half + i, part);
        const Vec c = load(t.cos + i, part), s = load(t.sin + i, part) * sign;
        store(x * c - y * s, out + i, part);
        store(y * c + x * s, out + t.half + i, part);
    });
}

// in and, where there is one, x: of the head
template <class T>
void turn_head(const Rotation<T>& a, const Tables& tables, const T* w, const T* in, const T* x, float rstd, T* out) {
    if (x) {
        alignas(64) float turned[WIDEST];
        turn(tables, in, turned);
        normalize_backward(turned, x, w, static_cast<const T*>(nullptr), rstd, a.offset, a.D, out);
    } else if (w) {
        alignas(64) float normal[WIDEST];
        normalize(in, w, rstd, a.offset, a.llama, a.D, normal);
        turn(tables, normal, out);
    } else {
        turn(tables, in, out);
        const int64_t turned = 2 * a.half;
        if (in != out && turned < a.D)
            std::memcpy(out + turned, in + turned, static_cast<size_t>(a.D - turned) * sizeof(T));
    }
}

template <class T>
void rotate_token(const Rotation<T>& a, const Heads<T>& heads, int64_t b, int64_t t) {
    const int64_t row = b * a.table_batch + t * a.half;
    const Tables tables = {a.cos + row, a.sin + row, a.half, a.sign};
    const auto at = [&](const Strides& s, int64_t h) { return b * s.batch + t * s.token + h * s.head; };
    const auto in = [&](int64_t h) { return heads.in + at(heads.of_in, h); };
    const auto x = [&](int64_t h) { return heads.x ? heads.x + at(heads.of_x, h) : nullptr; };
    for (int64_t first = 0; first < heads.number; first += GROUP) {
        const int64_t last = smaller(first + GROUP, heads.number);
        float rstd[GROUP] = {};
        for (int64_t h = first; heads.w && h < last; ++h)
            rstd[h - first] = reciprocal_rms(squares(heads.x ? x(h) : in(h), a.D), a.D, a.eps);
        for (int64_t h = first; h < last; ++h)
            turn_head(a, tables, heads.w, in(h), x(h), rstd[h - first], heads.out + at(heads.of_out, h));
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
