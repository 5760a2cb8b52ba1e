// The parallel loop, in two forms, and a team of threads.
//
// As a rule the loop runs on torch's OpenMP pool, in as many threads as torch has. A thread of OpenMP that waits spins
// for milliseconds; on processors that others use too, in the time of the thread that it waits for, and the caller waits
// at the end of every loop for threads that may not have got a processor yet. Hundreds of loops make a training step.
//
// After lk_set_threads the library has threads of its own, for a caller whose torch has only one: two pools would spin
// against each other. The caller lays out a job, [0, n) in shares of pieces, and begins with the first share. A helper
// that is awake takes pieces of another one, and who has finished a share goes on with the next: a piece is whoever's
// takes it first. No sum goes beyond a piece, so that changes no bit. The caller waits for pieces that are being worked
// on, never for a helper that has not come. Who waits spins for a moment, and then sleeps.
// There is one job at a time; a second caller works alone.
//
// A team is for threads that wait for each other, as decoding's do: OpenMP starts all of them at once.
#include "simd.h"

#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <atomic>

namespace {

constexpr int MOST = 64;             // threads
constexpr int PIECES = 8;            // of a share at most: what a late helper holds up is an eighth of it
// ns of spinning: what Python takes to bring the next job, and less for SHARED after the system took a processor away
constexpr int64_t PATIENCE = 200'000, LITTLE_PATIENCE = 10'000, TAKEN_AWAY = 1'000'000, SHARED = 1'000'000'000;

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Query = int (*)();

template <class F>
F found(const char* name) {
    return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
}

// torch loads its OpenMP runtime with global visibility, so it can be looked up instead of linked. Linking a second one
// would put two pools of spinning threads on the same cores. On macOS torch brings libomp, without the GOMP entry.
struct OpenMP {
    Parallel run = found<Parallel>("GOMP_parallel");
    Query max_threads = found<Query>("omp_get_max_threads");
    Query threads = found<Query>("omp_get_num_threads");
    Query thread = found<Query>("omp_get_thread_num");
    Query inside = found<Query>("omp_in_parallel");
    bool usable() const { return run && max_threads && threads && thread && inside; }
};

const OpenMP& openmp() {
    static const OpenMP instance;
    return instance;
}

std::atomic<int64_t> own{0};  // threads of this library; 0: none

// How many threads OpenMP may have here.
int64_t most_of_openmp() { return openmp().usable() && !openmp().inside() ? openmp().max_threads() : 1; }

int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

std::atomic<int64_t> shared_until{0};  // when others have wanted the processors long enough ago

// Whether `is_so` became true while this thread spun. If the clock jumps meanwhile, others want the processor.
template <class F>
bool spins_until(F is_so) {
    int64_t now = nanoseconds();
    const bool shared = now < shared_until.load(std::memory_order_relaxed);
    const int64_t end = now + (shared ? LITTLE_PATIENCE : PATIENCE);
    do {
        for (int i = 0; i < 16; ++i) {
            if (is_so()) return true;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        const int64_t before = now;
        now = nanoseconds();
        if (now - before > TAKEN_AWAY) shared_until.store(now + SHARED, std::memory_order_relaxed);
    } while (now < end);
    return is_so();
}

struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
};

class Pool {
  public:
    void run(int64_t n, int64_t grain, int64_t threads, void (*work)(void*, int64_t, int64_t), void* with) {
        const int64_t share = (n + threads - 1) / threads;
        piece = (share + PIECES - 1) / PIECES;
        if (piece < grain) piece = grain;
        shares = (n + share - 1) / share;
        for (int64_t i = 0; i < shares; ++i) {
            share_of[i].next.store(i * share, std::memory_order_relaxed);
            share_of[i].end = simd::smaller(n, (i + 1) * share);
        }
        body = work;
        context = with;
        while (helpers < shares - 1 && start_helper()) {
        }
        open.store(shares - 1, std::memory_order_relaxed);
        inside.store(0, std::memory_order_release);  // the door is open
        jobs.fetch_add(1);
        if (sleepers.load() > 0) {
            pthread_mutex_lock(&lock);
            pthread_cond_broadcast(&come);
            pthread_mutex_unlock(&lock);
        }
        take(0);
        close();
    }

    pthread_mutex_t caller = PTHREAD_MUTEX_INITIALIZER;  // held by who has the job

  private:
    static constexpr int64_t CLOSED = int64_t{1} << 32;

    void take(int64_t worker) {
        for (int64_t i = 0; i < shares; ++i) {
            Share& share = share_of[(worker + i) % shares];
            for (;;) {
                const int64_t first = share.next.fetch_add(piece, std::memory_order_relaxed);
                if (first >= share.end) break;
                body(context, first, simd::smaller(first + piece, share.end));
            }
        }
    }

    // Lets nobody in any more, and waits for those who are inside.
    void close() {
        if (inside.fetch_add(CLOSED, std::memory_order_acq_rel) == 0) return;
        const auto alone = [this] { return inside.load(std::memory_order_acquire) == CLOSED; };
        if (spins_until(alone)) return;
        pthread_mutex_lock(&lock);
        waits.store(true);
        while (!alone()) pthread_cond_wait(&gone, &lock);
        waits.store(false);
        pthread_mutex_unlock(&lock);
    }

    bool enter() {
        int64_t now = inside.load(std::memory_order_relaxed);
        while (now < CLOSED)
            if (inside.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) return true;
        return false;
    }

    void leave() {
        inside.fetch_sub(1);
        if (!waits.load()) return;
        pthread_mutex_lock(&lock);
        pthread_cond_signal(&gone);
        pthread_mutex_unlock(&lock);
    }

    void help(int64_t worker) {
        for (int64_t seen = 0;;) {
            const auto called = [&] { return jobs.load(std::memory_order_acquire) != seen; };
            if (!spins_until(called)) {
                pthread_mutex_lock(&lock);
                sleepers.fetch_add(1);
                while (!called()) pthread_cond_wait(&come, &lock);
                sleepers.fetch_sub(1);
                pthread_mutex_unlock(&lock);
            }
            seen = jobs.load(std::memory_order_acquire);
            if (!enter()) continue;
            if (worker <= open.load(std::memory_order_relaxed)) take(worker);
            leave();
        }
    }

    bool start_helper() {
        struct Start {
            Pool* pool;
            int64_t worker;
        };
        pthread_t thread;
        auto* start = new Start{this, helpers + 1};
        const auto main = [](void* data) -> void* {
            const Start with = *static_cast<Start*>(data);
            delete static_cast<Start*>(data);
            with.pool->help(with.worker);
            return nullptr;
        };
        if (pthread_create(&thread, nullptr, main, start) != 0) {
            delete start;
            return false;
        }
        pthread_detach(thread);
        ++helpers;
        return true;
    }

    // the job
    void (*body)(void*, int64_t, int64_t) = nullptr;
    void* context = nullptr;
    int64_t piece = 0, shares = 0;
    Share share_of[MOST];

    alignas(64) std::atomic<int64_t> jobs{0};         // that there have been
    alignas(64) std::atomic<int64_t> inside{CLOSED};  // helpers at work, and whether the door is closed
    std::atomic<int64_t> open{0};                     // helpers that may come
    std::atomic<int64_t> sleepers{0};
    std::atomic<bool> waits{false};
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t come = PTHREAD_COND_INITIALIZER, gone = PTHREAD_COND_INITIALIZER;
    int64_t helpers = 0;
};

// Never destroyed, as its helpers never end. A forked process has none of them, and gets a pool of its own.
Pool* pool = nullptr;

void make_pool() { pool = new Pool; }

void make_pool_once() {
    make_pool();
    pthread_atfork(nullptr, nullptr, make_pool);
}

struct Team {
    int64_t n;
    void (*body)(void*, int64_t, int64_t);
    void* context;
};

void run_share(void* data) {
    const Team* team = static_cast<const Team*>(data);
    const int64_t threads = openmp().threads(), index = openmp().thread();
    const int64_t share = (team->n + threads - 1) / threads;
    const int64_t first = index * share, last = simd::smaller(first + share, team->n);
    if (first < last) team->body(team->context, first, last);
}

void run_team(Team team, int64_t threads) {
    if (threads <= 1) return team.body(team.context, 0, team.n);
    openmp().run(run_share, &team, static_cast<unsigned>(threads), 0);
}

}  // namespace

extern "C" {

// How many threads of its own the loop has from now on, 64 at most; 0: it runs on OpenMP's.
__attribute__((visibility("default"))) void lk_set_threads(int64_t count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_pool_once);
    own.store(simd::smaller(count, MOST));
}

void lk_parallel_for(int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    if (n <= 0) return;
    const int64_t pieces = (n + grain - 1) / grain, threads = own.load();
    if (!threads) return run_team({n, body, context}, simd::smaller(most_of_openmp(), pieces));
    if (threads == 1 || pieces == 1 || pthread_mutex_trylock(&pool->caller) != 0) return body(context, 0, n);
    pool->run(n, grain, simd::smaller(threads, pieces), body, context);
    pthread_mutex_unlock(&pool->caller);
}

void lk_team(int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
    const bool usable = openmp().usable() && !openmp().inside();
    run_team({n, body, context}, usable && own.load() ? own.load() : most_of_openmp());
}

}  // extern "C"
