// What this machine has, for kernels/dispatch.py: its instruction sets, and what oneDNN and MKL make of them.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

extern "C" {

// The instruction sets that this library was built for and this processor (and its system) runs, the best last.
__attribute__((visibility("default"))) const char* lk_runnable() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(LORAKIT_AVX512BF16)
    if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return "scalar avx2 avx512 avx512bf16";
#endif
    if (avx2 && avx512) return "scalar avx2 avx512";
    if (avx2) return "scalar avx2";
    return "scalar";
#elif defined(__aarch64__)
    return "scalar neon";
#else
    return "scalar";
#endif
}

// Whether the processor multiplies tiles of bf16 (AMX-BF16: bit 22 of edx, leaf 7 of cpuid; Intel's manual, volume 2).
__attribute__((visibility("default"))) int lk_multiplies_tiles() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
    return 0;
#endif
}

// Whether the processor multiplies pairs of bf16 (vdpbf16ps of AVX512-BF16) no faster than single values in fp32. Intel's
// begin one such instruction every second cycle, and two multiply-adds of fp32 every cycle: 86 and 169 GFLOP/s a thread
// (Emerald Rapids). AMD's begin two of either.
__attribute__((visibility("default"))) int lk_pairs_are_slow() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
#else
    return 0;
#endif
}

// Whether the processor is AMD's and has AVX-512, which MKL, made by Intel, leaves unused there.
__attribute__((visibility("default"))) int lk_mkl_is_slow() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
#else
    return 0;
#endif
}

}  // extern "C"
