// SwiGLU and GeGLU on the CPU: one pass, fp32 inside, one rounding. The formulas are those of triton.py; e below is
// e^-|v| of what the sigmoid is taken of, so that nothing overflows and s (1 - s) = e / (1 + e)^2 does not cancel.
//
// Against fp64 silu is off by 2.6 ulp at most (2.7 where multiply and add are rounded apart), its slope by 2.3e-7; the
// other two by 1.5e-7 of the larger of 1 and the value, their slopes by 2.2e-7. In the negative tail, where both are
// tiny, their relative error grows to some hundred ulp, that of the exponent; 1 + tanh and 1 + erf would cancel there.
//
// swiglu_oai is silu of 1.702 z, whose rounding counts z times in the exponential, as in every fp32 form of it.
//
// A value depends on its own operands alone, in a whole vector or in the rest of one: the threads change no bit.
// Every output may be one of the operands.
#define LORAKIT_ANY_LANES
#include "simd.h"

namespace {

using namespace simd;

struct Activated {
    Vec value, slope;
};

// what the other operand is to the product
struct Plain {
    static Activated other(Vec up) { return {up, fill(1)}; }
};

struct Silu : Plain {
    static Activated at(Vec z) {
        const Vec one = fill(1);
        const Exponential parts = exponential_parts(-magnitude(z));
        const Vec e = madd(parts.power, parts.rest, parts.power);
        const Vec whole = madd(parts.power, parts.rest, one + parts.power);  // 1 + e, rounded once
        const Vec scaled = z * parts.power;                                  // exact
        const Vec s = by_sign(z, e, one) / whole;
        const Vec other = by_sign(z, one, e) / whole;  // 1 - s
        return {by_sign(z, madd(scaled, parts.rest, scaled), z) / whole, s * madd(z, other, one)};
    }
};

// z (1 + tanh u) / 2 = z s(2u) for u = sqrt(2 / pi) (z + 0.044715 z^3)
struct GeluTanh : Plain {
    static Activated at(Vec z) {
        const float root = 0.7978845608028654f, cubic = 0.044715f;
        const Vec one = fill(1), a = smaller(fill(12), magnitude(z)), square = a * a;  // beyond 12, e is 0
        const Vec e = exponential2(fill(-2 * LOG2E * root) * madd(fill(cubic) * square, a, a)), whole = one + e;
        const Vec s = by_sign(z, e, one) / whole;
        const Vec du = fill(root) * madd(fill(3 * cubic), square, one);
        return {by_sign(z, z * e, z) / whole, madd(fill(2) * z * e / (whole * whole), du, s)};
    }
};

// z Phi(z). Phi(-|z|) = e^(-z^2 / 2) P(y) for y = 1 / (1 + 0.35 |z|), a form of Abramowitz and Stegun, 26.2.17;
// P is the minimax polynomial of degree 9, off by 3.2e-8 of the value up to 14, where Phi is below fp32.
struct Gelu : Plain {
    static Activated at(Vec z) {
        const float coefficients[] = {0.139621407f, 0.139861867f,  0.119832881f, 0.105507962f,  -0.0231097303f,
                                      0.15917401f,  -0.255714118f, 0.143971622f, -0.0291459151f};
        const Vec one = fill(1), a = smaller(fill(14), magnitude(z));
        const Vec e = exponential2(fill(-0.5f * LOG2E) * a * a), y = one / madd(fill(0.35f), a, one);
        const Vec tail = e * y * polynomial(coefficients, y);
        const Vec part = by_sign(z, tail, one - tail);
        const Vec density = fill(0.3989422804014327f) * e;
        return {z * part, madd(z, density, part)};
    }
};

// z s(1.702 z) of min(z, 7), times 1 + u of u between -7 and 7; beyond the bounds slopes are 0.
struct SwigluOai {
    static constexpr float alpha = 1.702f, limit = 7;

    static Activated at(Vec z) {
        const Activated silu = Silu::at(fill(alpha) * smaller(fill(limit), z));
        return {silu.value * fill(1 / alpha), by_sign(fill(limit) - z, fill(0), silu.slope)};
    }

    static Activated other(Vec up) {
        const Vec inside = larger(fill(-limit), smaller(fill(limit), up));
        return {fill(1) + inside, by_sign(fill(limit) - magnitude(up), fill(0), fill(1))};
    }
};

template <class T>
struct Forward {
    const T *gate, *up;
    T* y;
    int64_t n, activation;
};

template <class T>
struct Backward {
    const T *dy, *gate, *up;
    T *dgate, *dup, *y;  // y or null
    int64_t n, activation;
};

template <class A, class T>
void forward_with(const Forward<T>& a) {
    parallel(a.n, 1, [&](int64_t first, int64_t last) {
        vectors(last - first, [&](int64_t i, auto part) {
            i += first;
            store(A::at(load(a.gate + i, part)).value * A::other(load(a.up + i, part)).value, a.y + i, part);
        });
    });
}

template <class A, class T>
void backward_with(const Backward<T>& a) {
    parallel(a.n, 1, [&](int64_t first, int64_t last) {
        vectors(last - first, [&](int64_t i, auto part) {
            i += first;
            const Vec dy = load(a.dy + i, part);
            const Activated act = A::at(load(a.gate + i, part)), up = A::other(load(a.up + i, part));
            store(dy * up.value * act.slope, a.dgate + i, part);
            store(dy * act.value * up.slope, a.dup + i, part);
            if (a.y) store(act.value * up.value, a.y + i, part);
        });
    });
}

// activation: its value in the enum of activation.py
template <class T>
void forward(const Forward<T>& a) {
    if (a.activation == 0) return forward_with<Silu>(a);
    if (a.activation == 1) return forward_with<GeluTanh>(a);
    if (a.activation == 2) return forward_with<Gelu>(a);
    forward_with<SwigluOai>(a);
}

template <class T>
void backward(const Backward<T>& a) {
    if (a.activation == 0) return backward_with<Silu>(a);
    if (a.activation == 1) return backward_with<GeluTanh>(a);
    if (a.activation == 2) return backward_with<Gelu>(a);
    backward_with<SwigluOai>(a);
}

}  // namespace

extern "C" {

void LK_EXPORT(gated_fp32)(const Forward<float>* pass) { forward(*pass); }
void LK_EXPORT(gated_bf16)(const Forward<uint16_t>* pass) { forward(*pass); }
void LK_EXPORT(gated_backward_fp32)(const Backward<float>* pass) { backward(*pass); }
void LK_EXPORT(gated_backward_bf16)(const Backward<uint16_t>* pass) { backward(*pass); }

}  // extern "C"
