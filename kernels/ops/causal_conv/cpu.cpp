// The causal convolution of channels and SiLU on the CPU, forward and backward.
//
// A unit of work is a block of tokens of one document, with all channels. Backward computes the sums of a block again,
// and those of the K - 1 tokens behind it, which the block's inputs are a part of: nothing is kept but x.
//
//     forward    y_t = s_t sigmoid(s_t)        s_t = sum_j w_j x_(t-K+1+j)
//     backward   dx_t = sum_j w_j ds_(t+K-1-j)        ds = dy sigmoid(s) (1 + s (1 - sigmoid(s)))
#define LORAKIT_ANY_LANES
#include "simd.h"

namespace {

using namespace simd;

constexpr int64_t TOKENS = 32;    // of a block
constexpr int64_t MOST = 8;       // K at most
constexpr int64_t STRIP = 128;    // channels whose gradients of a block's sums exist at a time: whole vectors

// cpu.py has the same layouts.
struct Block {
    int64_t row, document, end, first;  // tokens: the document is [document, end), the block begins at first
};

template <class T>
struct CausalConv {
    const T *x, *dy;      // [B, T, C], dense in C
    T *y, *dx;            // [B, T, C]
    const float* weight;  // [K, C]
    const float* state;   // [B, K-1, C]: what lies before a row; null: zeros
    const Block* blocks;
    int64_t count, T_, C, K, x_row, x_token, dy_row, dy_token;  // strides of x and dy

    // Row t of x, which may lie before the document; null: zeros.
    template <class F>
    Vec times(const Block& block, int64_t t, int64_t c, F some, Vec by, Vec sum) const {
        if (t >= block.document) return madd(by, load(x + block.row * x_row + t * x_token + c, some), sum);
        if (!state) return sum;
        return madd(by, load(state + (block.row * (K - 1) + t - block.document + K - 1) * C + c, some), sum);
    }

    template <class F>
    Vec sum_of(const Block& block, int64_t t, int64_t c, F some) const {
        Vec sum = fill(0);
        for (int64_t j = 0; j < K; ++j) sum = times(block, t - K + 1 + j, c, some, load(weight + j * C + c, some), sum);
        return sum;
    }

    void forward(const Block& block) const {
        for (int64_t t = block.first; t < smaller(block.first + TOKENS, block.end); ++t) {
            T* out = y + (block.row * T_ + t) * C;
            vectors(C, [&](int64_t c, auto some) {
                const Vec s = sum_of(block, t, c, some);
                store(s / (fill(1) + exponential(smaller(-s, fill(88)))), out + c, some);
            });
        }
    }

    void backward(const Block& block) const {
        alignas(64) float slopes[TOKENS + MOST - 1][STRIP];  // ds of the block's tokens and of those behind it
        const int64_t end = smaller(block.first + TOKENS, block.end), last = smaller(end + K - 1, block.end);
        for (int64_t strip = 0; strip < C; strip += STRIP) {
            const int64_t wide = smaller(STRIP, C - strip);
            for (int64_t t = block.first; t < last; ++t) {
                const T* grad = dy + block.row * dy_row + t * dy_token + strip;
                vectors(wide, [&](int64_t c, auto some) {
                    const Vec s = sum_of(block, t, strip + c, some), one = fill(1);
                    const Vec sigmoid = one / (one + exponential(smaller(-s, fill(88))));
                    const Vec slope = sigmoid * madd(s, one - sigmoid, one);
                    store(load(grad + c, some) * slope, slopes[t - block.first] + c);
                });
            }
            for (int64_t t = block.first; t < end; ++t) {
                T* out = dx + (block.row * T_ + t) * C + strip;
                vectors(wide, [&](int64_t c, auto some) {
                    Vec sum = fill(0);
                    for (int64_t j = K - 1; j >= 0 && t + K - 1 - j < last; --j)
                        sum = madd(load(weight + j * C + strip + c, some),
                                   load(slopes[t + K - 1 - j - block.first] + c), sum);
                    store(sum, out + c, some);
                });
            }
        }
    }
};

template <class T>
void run(const CausalConv<T>& a, bool backward) {
    parallel(a.count, TOKENS * a.C, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) backward ? a.backward(a.blocks[i]) : a.forward(a.blocks[i]);
    });
}

}  // namespace

extern "C" {

void LK_EXPORT(causal_conv_fp32)(const CausalConv<float>* a) { run(*a, false); }
void LK_EXPORT(causal_conv_bf16)(const CausalConv<uint16_t>* a) { run(*a, false); }
void LK_EXPORT(causal_conv_backward_fp32)(const CausalConv<float>* a) { run(*a, true); }
void LK_EXPORT(causal_conv_backward_bf16)(const CausalConv<uint16_t>* a) { run(*a, true); }

}  // extern "C"
