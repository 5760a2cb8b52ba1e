// What every cpu.cpp needs: the exported name of an op, the parallel loop, and bf16 rounding.
//
// Each cpu.cpp is compiled once per instruction set (CMakeLists.txt) with LORAKIT_ISA = scalar, avx2, ...
// LK_EXPORT(op) then names lk_scalar_op, lk_avx2_op, ..., and kernels/dispatch.py picks from lk_runnable().
// Everything else in a cpu.cpp lives in an anonymous namespace: an inline function that is shared between two
// copies could be linked in its AVX2 form into the scalar one, and die on an old machine.
#pragma once
#include <cstdint>
#include <cstring>

#define LK_JOIN_(a, b, c, d) a##b##c##d
#define LK_JOIN(a, b, c, d) LK_JOIN_(a, b, c, d)
#define LK_EXPORT(op) __attribute__((visibility("default"))) LK_JOIN(lk_, LORAKIT_ISA, _, op)

// Runs body(context, first, last) over [0, n) in contiguous pieces of at least `grain`, on torch's OpenMP pool.
extern "C" void lk_parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

namespace {

// fp32 -> bf16, round to nearest even. Finite input only.
inline uint16_t bf16_from_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
