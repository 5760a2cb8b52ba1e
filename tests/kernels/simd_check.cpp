// The functions of simd.h against C's own, value by value, for whatever instruction set it is compiled for; says what
// differs. tests/kernels/test_simd.py compiles and runs it.
#define LORAKIT_ANY_LANES
#include "simd.h"

#include <math.h>
#include <stdio.h>

using namespace simd;

extern "C" void lk_parallel_for(int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
    body(context, 0, n);
}

namespace {

int failures = 0;

uint32_t bits(float a) {
    uint32_t found;
    std::memcpy(&found, &a, 4);
    return found;
}

float number(uint32_t bits) {
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

bool same(float a, float b) { return bits(a) == bits(b) || (isnan(a) && isnan(b)); }

void expect(bool fine, const char* what, float x, float found) {
    if (fine) return;
    if (++failures < 20) printf("%s of %a (%08x) is %a (%08x)\n", what, x, bits(x), found, bits(found));
}

double ulps(float found, double exact) {
    return fabs(found - exact) / ldexp(1, ilogb(exact) - 23);
}

struct Numbers {  // of any bits, but no NaN whose lower half is all ones
    uint32_t state = 1;
    float next() {
        state = state * 1664525u + 1013904223u;
        const float a = number(state ^ state >> 15);
        return isnan(a) ? number(0x7fc00000u) : a;
    }
};

void arithmetic(const float* a, const float* b, const float* c) {
    const Vec x = load(a), y = load(b), z = load(c);
    const struct {
        const char* what;
        Vec found;
        float (*expected)(float, float, float);
    } functions[] = {
        {"+", x + y, [](float p, float q, float) { return p + q; }},
        {"-", x - y, [](float p, float q, float) { return p - q; }},
        {"*", x * y, [](float p, float q, float) { return p * q; }},
        {"/", x / y, [](float p, float q, float) { return p / q; }},
        {"minus", -x, [](float p, float, float) { return -p; }},
        {"larger", larger(x, y), [](float p, float q, float) { return p > q ? p : q; }},
        {"smaller", smaller(x, y), [](float p, float q, float) { return p < q ? p : q; }},
        {"magnitude", magnitude(x), [](float p, float, float) { return fabsf(p); }},
        {"square_root", square_root(magnitude(x)), [](float p, float, float) { return sqrtf(fabsf(p)); }},
        {"by_sign", by_sign(x, y, z), [](float p, float q, float r) { return signbit(p) ? q : r; }},
        {"power_of_two", power_of_two(x), [](float p, float, float) { return number(bits(p) << 23); }},
        {"rounded", rounded<uint16_t>(x), [](float p, float, float) { return widen(bf16_from_float(p)); }},
        {"rounded to fp32", rounded<float>(x), [](float p, float, float) { return p; }},
#if defined(__FMA__) || defined(LORAKIT_NEON)
        {"madd", madd(x, y, z), fmaf},
#else
        {"madd", madd(x, y, z), [](float p, float q, float r) { return p * q + r; }},
#endif
    };
    for (const auto& function : functions) {
        float found[LANES];
        store(function.found, found);
        for (int i = 0; i < LANES; ++i)
            expect(same(found[i], function.expected(a[i], b[i], c[i])), function.what, a[i], found[i]);
    }
}

// The first `count` values, or all of them if `part` says so; nothing beyond is read into the result or written.
template <class Part>
void memory(const float* a, int64_t count, Part part) {
    float found[LANES], copy[LANES];
    uint16_t halves[LANES], stored[LANES];
    for (int i = 0; i < LANES; ++i) {
        halves[i] = bf16_from_float(a[i]);
        copy[i] = 7;
        stored[i] = 7;
    }
    store(load(a, part), copy, part);
    store(load(a, part), stored, part);
    for (int i = 0; i < LANES; ++i) {
        expect(same(copy[i], i < count ? a[i] : 7), "store", a[i], copy[i]);
        expect(stored[i] == (i < count ? halves[i] : 7), "store as bf16", a[i], widen(stored[i]));
    }
    store(load(a, part), found);
    for (int i = 0; i < LANES; ++i) expect(same(found[i], i < count ? a[i] : 0), "load", a[i], found[i]);
    store(load(halves, part), found);
    for (int i = 0; i < LANES; ++i)
        expect(same(found[i], i < count ? widen(halves[i]) : 0), "load of bf16", a[i], found[i]);
    store(only(load(a), part, 5), found);
    for (int i = 0; i < LANES; ++i) expect(same(found[i], i < count ? a[i] : 5), "only", a[i], found[i]);
}

void over_lanes(const float* a) {  // small integers, whose sum is exact in any order
    float v[LANES], total = 0, top = -INFINITY;
    for (int i = 0; i < LANES; ++i) {
        v[i] = static_cast<float>(static_cast<int>(bits(a[i]) % 2001) - 1000);
        total += v[i];
        top = v[i] > top ? v[i] : top;
    }
    expect(sum(load(v)) == total, "sum", v[0], sum(load(v)));
    expect(largest(load(v)) == top, "largest", v[0], largest(load(v)));
}

void functions() {
    for (int start = 0; start < 400000; start += LANES) {
        float x[LANES], e[LANES], power[LANES], t[LANES];
        for (int i = 0; i < LANES; ++i) x[i] = static_cast<float>(start + i) * (175.0f / 400000) - 87;
        store(exponential(load(x)), e);
        store(exponential2(load(x)), power);
        store(tanh(load(x)), t);
        for (int i = 0; i < LANES; ++i) {  // as simd.h says; two roundings for one where nothing is fused
#if defined(__FMA__) || defined(LORAKIT_NEON)
            const double allowed = 0;
#else
            const double allowed = 1;
#endif
            expect(ulps(e[i], exp(static_cast<double>(x[i]))) <= 1.1 + allowed, "exponential", x[i], e[i]);
            expect(ulps(power[i], exp2(static_cast<double>(x[i]))) <= 1.1 + allowed, "exponential2", x[i], power[i]);
            expect(ulps(t[i], ::tanh(static_cast<double>(x[i]))) <= 2 + allowed, "tanh", x[i], t[i]);
        }
    }
    float found[LANES];
    const float ends[] = {-INFINITY, -1e30f, -127.5f, 0.0f, NAN};
    for (const float x : ends) {
        store(exponential(fill(x)), found);
        const float expected = isnan(x) ? x : x == 0 ? 1.0f : 0.0f;
        expect(same(found[0], expected), "exponential", x, found[0]);
        store(exponential2(fill(x)), found);
        expect(same(found[0], expected), "exponential2", x, found[0]);
    }
}

}  // namespace

int main() {
    Numbers numbers;
    for (int round = 0; round < 20000; ++round) {
        float a[3][LANES];
        for (auto& vector : a)
            for (float& value : vector) value = numbers.next();
        arithmetic(a[0], a[1], a[2]);
        memory(a[0], LANES, All{});
        for (int64_t count = 1; count < LANES; ++count) memory(a[0], count, First{count});
        over_lanes(a[0]);
    }
    functions();
    printf("%d lanes, %d failures\n", LANES, failures);
    return failures != 0;
}
