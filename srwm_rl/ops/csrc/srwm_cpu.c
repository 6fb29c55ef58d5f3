/* The SRWM recurrence, the delta rule and the step of a whole small network on the CPU: plain C, no Python and no torch
 * headers, called through ctypes.
 *
 * srwm_kernel.h, held_kernel.h, delta_kernel.h and tape_kernel.h are the algorithms; they are compiled for float and
 * (but for the last) double, each portably and, on x86 with GCC or clang, for AVX2 and AVX-512. Which one runs is chosen
 * at run time: srwm_cpu_level() is the best this machine has.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 16 }; /* steps between checkpoints */

typedef struct {
    int64_t T, B, H, D, E, grain, next;
    double bound;                   /* on the shift's norm, per batch entry and head; 0: none */
    const void *x, *weight, *shift; /* shift: NULL for zeros */
    const unsigned char *starts;    /* [T, B], or NULL */
    void *y, *final, *checkpoints;  /* y [T, B, H, E]; checkpoints [(T - 1) / CHUNK, B, H, D, E+2D+4], or NULL: none */
    const void *grad_y, *grad_final; /* either may be NULL: zeros */
    void *grad_x, *grad_weight, *grad_shift; /* grad_x NULL: forward. grad_weight [B, H, D, E+2D+4], to be summed */
    const void *retention; /* [T, B, H], or NULL: ones */
    void *grad_retention;  /* likewise */
    /* NULL: an SRWM. Else the delta rule: x is the key, weight and E are not used; shift, final and checkpoints hold
     * the fast weight, [B, H, D, D] */
    const void *value, *query, *rate;
    void *grad_value, *grad_query, *grad_rate;
    int failed;
} Job;

enum { TILE = 64 }; /* environments that a network's step is computed for at once */
enum { TAKE_INPUT, GIVE_OUTPUT, LINEAR, NORM, SOFTMAX, SINES, HEADS, CHOOSE };
enum { IDENTITY, RELU, SIGMOID, TANH };

/* What is done to rows of a tile. `from`, `to`, `add`: first rows, -1: none.
 *   TAKE_INPUT   to = inputs[index], n_out columns
 *   GIVE_OUTPUT  outputs[index] = from, n_in columns
 *   LINEAR       to = activation(weight from + bias) + add; weight [n_out, n_in], bias [n_out] or NULL
 *   NORM         to = layer norm of from's n_in rows; weight and bias [n_in], number: added to the variance
 *   SOFTMAX      to = softmax of from, within each n_out of its n_in rows
 *   SINES        to = n_out sines, then as many cosines, of from by its periods, weight [n_out]
 *   HEADS        to = what the n_out heads of layer `index` read of from, [n_in]; weight [H, D, 3D+4], number: the
 *                bound, add: retention
 *   CHOOSE       choices and outputs[index], their log-probabilities, from n_in logits and as many clocks, add
 */
typedef struct {
    int32_t kind, activation, from, to, add, n_in, n_out, index;
    float number;
    const float *weight, *bias;
} Op;

typedef struct {
    int64_t B, n_ops, n_rows, n_spare, next, grain; /* n_spare: rows that a HEADS needs besides */
    const Op *ops;
    const float *const *inputs; /* [B, n] each */
    float *const *outputs;      /* likewise */
    int64_t *choices;           /* [B] */
    const float *state;         /* [L, B, S] */
    float *final;
    const unsigned char *starts; /* [B] */
    int level, failed;
} Tape;

#define HELD(job) ((job)->bound > 0 || (job)->retention) /* needs held_kernel.h */

#define GLUE2(a, b) a##b
#define GLUE(a, b) GLUE2(a, b)

#if defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#ifndef ALWAYS_INLINE /* the sanitizers' build sets it empty: inlined, it would take them minutes to compile */
#define ALWAYS_INLINE __attribute__((always_inline))
#endif
#define NOINLINE __attribute__((noinline))
#define ALIGNED __attribute__((aligned(64)))
#define TAKE(job) __atomic_fetch_add(&(job)->next, (job)->grain, __ATOMIC_RELAXED)
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
#define PORTABLE_VLEN 4
#else
#define EXPORT __declspec(dllexport)
#define ALWAYS_INLINE
#define NOINLINE __declspec(noinline)
#define ALIGNED
#define TAKE(job) (((job)->next += (job)->grain) - (job)->grain) /* one thread: see `run` */
#define UNROLL
#define PORTABLE_VLEN 1
#endif
#if defined(__clang__)
#define SHUF(ivec, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#elif defined(__GNUC__)
#define SHUF(ivec, a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors never leave this file */
#endif
#define SCALAR_MAX(a, b) ((a) > (b) ? (a) : (b))
#define SELECT_MAX(a, b) ((vec)(((ivec)((a) > (b)) & (ivec)(a)) | (~(ivec)((a) > (b)) & (ivec)(b))))

typedef void (*Share)(void *);
typedef void (*Parallel)(Share, void *, unsigned threads, unsigned flags); /* GOMP_parallel */
static Share choose(int is_double, int level, int64_t D);

#define REAL float
#define IREAL int32_t
#define EXP1 expf
#define VLEN PORTABLE_VLEN
#define NAME(x) GLUE(x, _f32)
#define TARGET
#if PORTABLE_VLEN == 1
#define VMAX SCALAR_MAX
#else
#define VMAX SELECT_MAX
#endif
#include "srwm_kernel.h"

#define REAL double
#define REAL_IS_DOUBLE
#define IREAL int64_t
#define EXP1 exp
#define VLEN 1
#define NAME(x) GLUE(x, _f64)
#define TARGET
#define VMAX SCALAR_MAX
#include "srwm_kernel.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define HAVE_X86
#include <immintrin.h>

#define REAL float
#define IREAL int32_t
#define EXP1 expf
#define VLEN 8
#define NAME(x) GLUE(x, _f32_avx2)
#define TARGET __attribute__((target("avx2,fma")))
#define VMAX(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#include "srwm_kernel.h"

#define REAL double
#define REAL_IS_DOUBLE
#define IREAL int64_t
#define EXP1 exp
#define VLEN 4
#define NAME(x) GLUE(x, _f64_avx2)
#define TARGET __attribute__((target("avx2,fma")))
#define VMAX(a, b) ((vec)_mm256_max_pd((__m256d)(a), (__m256d)(b)))
#include "srwm_kernel.h"

#define REAL float
#define IREAL int32_t
#define EXP1 expf
#define VLEN 16
#define NAME(x) GLUE(x, _f32_avx512)
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define VMAX(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#include "srwm_kernel.h"
#endif

/* Changes with Job or the meaning of a call, so that a stale build is noticed. */
EXPORT int srwm_cpu_version(void) { return 4; }

/* 0: portable, 1: AVX2, 2: AVX-512 */
EXPORT int srwm_cpu_level(void) {
#ifdef HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

static Share choose(int is_double, int level, int64_t D) {
#ifdef HAVE_X86
    if (is_double) return level >= 1 ? share_f64_avx2 : share_f64;
    if (level >= 2 && D > 8) return share_f32_avx512; /* small heads would be mostly padding */
    if (level >= 1) return share_f32_avx2;
#else
    (void)level, (void)D;
#endif
    return is_double ? share_f64 : share_f32;
}

/* Run the job; `parallel`: torch's own OpenMP entry, so that its threads do the work, or NULL. 1: out of memory. */
EXPORT int srwm_cpu_run(Job *job, int is_double, int level, unsigned threads, Parallel parallel) {
    int64_t pairs = job->B * job->H;
    Share share = choose(is_double, level, job->D);
    job->next = 0;
    job->failed = 0;
#if !defined(__GNUC__)
    parallel = 0;
#endif
    if (!parallel || threads < 2) {
        job->grain = pairs;
        share(job);
    } else {
        job->grain = pairs / (4 * (int64_t)threads) + 1; /* several shares each: threads may be of unequal speed */
        parallel(share, job, threads, 0);
    }
    return job->failed;
}

static Share choose_play(int level) {
#ifdef HAVE_X86
    if (level >= 2) return play_f32_avx512;
    if (level >= 1) return play_f32_avx2;
#else
    (void)level;
#endif
    return play_f32;
}

/* Run a network's step; arguments and result as of srwm_cpu_run. */
EXPORT int srwm_cpu_play(Tape *tape, int level, unsigned threads, Parallel parallel) {
    tape->next = 0;
    tape->grain = 1;
    tape->level = level;
    tape->failed = 0;
#if !defined(__GNUC__)
    parallel = 0;
#endif
    if (!parallel || threads < 2 || tape->B <= TILE)
        choose_play(level)(tape);
    else
        parallel(choose_play(level), tape, threads, 0);
    return tape->failed;
}

/* Windows' linker is told by setuptools to export a module's entry; this is no Python module. */
EXPORT void *PyInit__srwm_cpu(void) { return 0; }
