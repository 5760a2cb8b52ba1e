// Sums of products of matrices, of which a factor may be stored in 4 bits (__init__.py says what for):
//
//     out [M, N] = scale * sum over the terms of  a [M, depth] b [depth, N]   + bias [N]
//
// A thread takes some columns at a time and lays out the b of all terms for them, a panel, in its own cache; the rows of
// a go past it, a tile of sums at a time, which stay in registers. There are two ways to multiply: pairs of bf16
// (pairs.h), and single values in fp32 (floats.h), which some processors do as fast.
//
// Every thread has a share of the tiles of every sum, takes some at a time, and helps with the other shares when its own
// is done: a thread that comes late, or not at all, holds nobody up. Two may lay out the same panel. A sum runs over the
// depth in order, in one thread: who takes a tile changes no bit.
//
// A term may have some rows alone. No tile has rows of which one has a term and the other has not, and a tile passes over
// the lines of terms that it has not. So the sum of a row is that of its own terms, to the bit, whatever other rows have.
#define LORAKIT_ANY_LANES
#include "floats.h"
#include "pairs.h"

#if defined(__AVX2__)

namespace {

constexpr int64_t TOGETHER = 2 << 20;  // products of two values, in the tiles that a thread takes at a time: some 10 us

// The rows of a tile, the `number`-th of a panel, and where those that have the same terms end.
struct Strip {
    int64_t number, row, count, border;
};

// One sum, cut into tiles: panel after panel, each from the first row to the last.
template <class Kernel>
struct Tiles {
    const Sum& p;
    Kernel kernel;
    const int64_t lanes = kernel.lanes, high = kernel.high;
    const int64_t tall = tiles_of_rows(), all = (p.N + lanes - 1) / lanes * tall;
    int64_t packed = -1;  // the first column of the panel that is laid out
    Strip strip{0, 0, 0, 0};

    Tiles(const Sum& sum, const Sums& sums, uint32_t* space) : p(sum), kernel(sum, sums, space) {}

    int64_t tiles_of_rows() const {
        int64_t count = 0;
        for (int64_t row = 0, border; row < p.M; row = border) {
            border = border_after(p, row);
            count += (border - row + high - 1) / high;
        }
        return count;
    }

    // The tile that begins at `row`. Those up to the border are of like height: a low one leaves multipliers idle.
    void begin(int64_t row) {
        if (row == strip.border) strip.border = border_after(p, row);
        const int64_t left = strip.border - row, more = (left + high - 1) / high;
        strip.row = row;
        strip.count = (left + more - 1) / more;
    }

    // Goes to the tile of a number: mostly the next.
    void go(int64_t number) {
        if (strip.count == 0 || number < strip.number) {
            strip.number = strip.border = 0;
            begin(0);
        }
        for (; strip.number < number; ++strip.number) begin(strip.row + strip.count);
    }

    // Where the depth is in parts, each part is laid out for as many tiles at a time as there is room for the sums of.
    int64_t together() const {
        const int64_t some = 1 + TOGETHER / (high * lanes * (1 + depth_of(p)));
        return kernel.parts == 1 ? some : simd::smaller(tall, kernel.room);
    }

    void add_up(int64_t from, int64_t to) {
        for (int64_t i = from, end; i < to; i = end) {
            const int64_t panel = i / tall, first = panel * lanes, columns = simd::smaller(lanes, p.N - first);
            end = simd::smaller(simd::smaller(to, (panel + 1) * tall), i + kernel.room);
            for (int64_t part = 0; part < kernel.parts; ++part) {
                if (first != packed || kernel.parts > 1) kernel.pack(first, columns, part);
                packed = first;
                for (int64_t n = i; n < end; ++n) {
                    go(n % tall);
                    kernel.add_up(n - i, part, strip.row, strip.count, first, columns);
                }
            }
        }
    }
};

template <class Kernel>
void work(void* data, int64_t from, int64_t to) {
    const Sums& all = *static_cast<const Sums*>(data);
    for (int64_t thread = from; thread < to; ++thread)
        for (int64_t n = 0; n < all.count; ++n) {
            if (all.sums[n].M == 0 || all.sums[n].N == 0) continue;  // the low of an adapter of rank 0
            Tiles<Kernel> tiles(all.sums[n], all, all.space + thread * all.size);
            const int64_t together = tiles.together();
            for (int64_t i = 0; i < all.threads; ++i) {
                const int64_t share = (thread + i) % all.threads;
                const int64_t first = tiles.all * share / all.threads, end = tiles.all * (share + 1) / all.threads;
                for (;;) {
                    Share& its = all.shares[n * all.threads + share];
                    const int64_t at = first + __atomic_fetch_add(&its.taken, together, __ATOMIC_RELAXED);
                    if (at >= end) break;
                    tiles.add_up(at, simd::smaller(at + together, end));
                }
            }
        }
}

void compute(Sums& sums) {
    int64_t products = 0;
    for (int64_t n = 0; n < sums.count; ++n) products += sums.sums[n].M * sums.sums[n].N * depth_of(sums.sums[n]);
    sums.threads = simd::smaller(sums.threads, 1 + products / TOGETHER);
#if defined(__AVX512BF16__)
    if (sums.pairs) return lk_parallel_for(sums.threads, 1, work<Pairs>, &sums);
#endif
    lk_parallel_for(sums.threads, 1, work<Floats>, &sums);
}

}  // namespace

// One after the other: each may read what those before have written.
extern "C" void LK_EXPORT(sums_of_products)(Sums* stages, int64_t count) {
    for (int64_t n = 0; n < count; ++n) compute(stages[n]);
}

#endif
