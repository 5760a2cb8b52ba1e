// The part of the shared library that exists once: which instruction sets this machine has, and the parallel loop.
//
// torch loads its OpenMP runtime with global visibility, so GOMP_parallel can be looked up instead of linked.
// Linking a second runtime would put two pools of spinning threads on the same cores. Where torch brings another
// runtime (macOS: libomp without the GOMP entry points), the loop runs on the calling thread.
#include "simd.h"

#include <dlfcn.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Query = int (*)();

struct Pool {
    Parallel run = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Query max_threads = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    Query threads = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    Query thread = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    Query inside = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
    bool usable() const { return run && max_threads && threads && thread && inside; }
};

const Pool& pool() {
    static const Pool instance;
    return instance;
}

struct Job {
    int64_t n;
    void (*body)(void*, int64_t, int64_t);
    void* context;
};

void run_share(void* data) {
    const Job* job = static_cast<const Job*>(data);
    const int64_t threads = pool().threads(), index = pool().thread();
    const int64_t share = (job->n + threads - 1) / threads;
    const int64_t first = index * share, last = first + share < job->n ? first + share : job->n;
    if (first < last) job->body(job->context, first, last);
}

}  // namespace

extern "C" {

void lk_parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    if (n <= 0) return;
    int64_t threads = 1;
    if (pool().usable() && !pool().inside()) {
        const int64_t pieces = (n + grain - 1) / grain;
        threads = pool().max_threads() < pieces ? pool().max_threads() : pieces;
    }
    if (threads <= 1) return body(context, 0, n);
    Job job{n, body, context};
    pool().run(run_share, &job, static_cast<unsigned>(threads), 0);
}

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
