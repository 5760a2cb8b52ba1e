// RMSNorm on the CPU: two passes over a row, the second of which finds it in the cache. fp32 inside; the rows of x may
// lie apart, everything else is dense.
//
// Forward keeps 1 / sqrt(mean(x^2) + eps) per row. With g = dy (offset + w) and x^ = x rstd,
//
//     dx = rstd (g - x^ mean(g x^))          dw = sum over rows of dy x^
//
// A frozen weight takes no dw. Otherwise the rows are cut into pieces, by their number alone, each piece adds up its
// own dw, and the caller adds those: the threads change no bit.
//
// The sum x + residual of a residual connection is made, rounded and normalized in one, and its gradient joins that
// of the norm.
#include "row.h"

namespace {

using namespace simd;

template <class T>
struct Norm {
    const T *x, *residual, *w;  // [rows, H]; [rows, H] or null; [H]
    T *total, *y;               // [rows, H]: x + residual, its norm
    float* rstd;                // [rows]
    int64_t stride, residual_stride, rows, H, llama;
    float eps, offset;
};

template <class T>
void forward(const Norm<T>& a) {
    parallel(a.rows, a.H, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const T* x = a.x + row * a.stride;
            Running sums;
            if (a.residual) {
                const T* residual = a.residual + row * a.residual_stride;
                T* total = a.total + row * a.H;
                sums = running(a.H, fill(0), [&](int64_t i, auto part, Vec sum) {
                    const Vec s = rounded<T>(load(x + i, part) + load(residual + i, part));
                    store(s, total + i, part);
                    return madd(s, s, sum);
                });
                x = total;
            } else {
                sums = squares(x, a.H);
            }
            a.rstd[row] = reciprocal_rms(sums, a.H, a.eps);
            normalize(x, a.w, a.rstd[row], a.offset, a.llama, a.H, a.y + row * a.H);
        }
    });
}

template <class T>
struct Gradient {
    const T *dy, *dtotal, *x, *w;  // [rows, H], dtotal or null; [H]
    const float* rstd;             // [rows]
    T* dx;                         // [rows, H]
    float* dw;                     // [pieces, H] or null
    int64_t stride, rows, H, pieces;
    float offset;
};

template <class T>
void backward_row(const Gradient<T>& a, int64_t row) {
    const T* dtotal = a.dtotal ? a.dtotal + row * a.H : nullptr;
    normalize_backward(a.dy + row * a.H, a.x + row * a.stride, a.w, dtotal, a.rstd[row], a.offset, a.H,
                       a.dx + row * a.H);
}

template <class T>
void backward(const Gradient<T>& a) {
    if (!a.dw) {
        parallel(a.rows, a.H, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) backward_row(a, row);
        });
        return;
    }
    const int64_t share = (a.rows + a.pieces - 1) / a.pieces;
    parallel(a.pieces, share * a.H, [&](int64_t first, int64_t last) {
        for (int64_t piece = first; piece < last; ++piece) {
            float* dw = a.dw + piece * a.H;
            std::memset(dw, 0, static_cast<size_t>(a.H) * sizeof(float));
            for (int64_t row = piece * share; row < smaller((piece + 1) * share, a.rows); ++row) {
                const T *x = a.x + row * a.stride, *dy = a.dy + row * a.H;
                const Vec rstd = fill(a.rstd[row]);
                backward_row(a, row);
                vectors(a.H, [&](int64_t i, auto part) {
                    store(madd(load(dy + i, part), load(x + i, part) * rstd, load(dw + i, part)), dw + i, part);
                });
            }
        }
    });
}

}  // namespace

extern "C" {

void LK_EXPORT(rms_norm_fp32)(const Norm<float>* norm) { forward(*norm); }
void LK_EXPORT(rms_norm_bf16)(const Norm<uint16_t>* norm) { forward(*norm); }
void LK_EXPORT(rms_norm_backward_fp32)(const Gradient<float>* gradient) { backward(*gradient); }
void LK_EXPORT(rms_norm_backward_bf16)(const Gradient<uint16_t>* gradient) { backward(*gradient); }

}  // extern "C"
