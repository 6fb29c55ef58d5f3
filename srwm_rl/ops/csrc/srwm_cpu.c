/* The SRWM recurrence, the delta rule and the step of a whole small network on the CPU: plain C, no Python and no torch
 * headers, called through ctypes.
 *
 * srwm_kernel.h, held_kernel.h, delta_kernel.h, lanes_kernel.h, tape_kernel.h and pool_kernel.h are the algorithms; they
 * are compiled for float and (but for the last three) double, each portably and, on x86 with GCC or clang, for AVX2 and
 * AVX-512. Which one runs is chosen at run time: srwm_cpu_level() is the best this machine has.
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

enum { TILE = 64, LANES = 16 }; /* rows that a network is computed for at once; numbers in the longest vector */
enum { TAKE_INPUT, GIVE_OUTPUT, LINEAR, NORM, SOFTMAX, LOG_PROB_AND_ENTROPY, SURROGATE, SINES, HEADS, SAMPLE };
enum { TERMS = 5 }; /* policy loss, value loss, entropy, approximate KL divergence, how often the ratio was clipped */
enum { IDENTITY, RELU, SIGMOID, TANH };
#define PADDED(n) (((size_t)(n) + LANES - 1) / LANES * LANES)

/* What is done to the features of a tile. `from`, `to`, `add`: the first of each, -1: none.
 *   TAKE_INPUT   to = inputs[index], n_out columns
 *   GIVE_OUTPUT  outputs[index] = from, n_in columns
 *   LINEAR       to = activation(weight from + bias + add); weight [n_out, n_in], bias [n_out] or NULL
 *   NORM         to = layer norm of from, n_in; weight and bias [n_in], number: added to the variance
 *   SOFTMAX      to = softmax of from, within each n_out of n_in
 *   LOG_PROB_AND_ENTROPY        to = the log-probability of the choice `add`, one feature, by n_in logits, and their entropy
 *   SURROGATE    the loss of PPO, on the way back alone: of a choice's judgement `from` and the value `add`, by four
 *                features from `to` on, log-probability, advantage, return and value as they were
 *   SINES        to = n_out sines, then as many cosines, of one feature by its periods, weight [n_out]
 *   HEADS        to = what the n_out heads of layer `index` read of from, n_in; weight [H, D, 3D+4], number: the bound,
 *                add: retention
 *   SAMPLE       choices and outputs[index], their log-probabilities, from n_in logits and as many exp_noise, add
 * The last three have no way back.
 */
typedef struct {
    int32_t kind, activation, from, to, add, n_in, n_out, index;
    int32_t leaf, weight_index, bias_index; /* leaf: nobody wants the gradient of from; where the others' go, -1: none */
    float number;
    int64_t sums; /* where a share's sums of gradients begin: what NAME(linear_back) and NAME(norm_back) say */
    const float *weight, *bias;
} Op;

/* What PPO's loss depends on beside the rows: its gradient is that of
 * (policy loss + vf_coef * value loss - ent_coef * entropy) * scale, each of them summed over rows. */
typedef struct {
    float mean, scale_advantage, low, high; /* the advantage counts as (it - mean) * scale_advantage; the ratio's bounds */
    float clip_range_vf;                    /* below 0: none */
    float clip_range, vf_coef, ent_coef, scale;
} PPOLossParams;

typedef struct {
    int64_t B, n_ops, n_features, n_spare, n_sums, n_shares, next, grain; /* n_spare: features needed besides */
    const Op *ops;
    const float *const *inputs; /* [B, n] each */
    float *const *outputs;      /* likewise; NULL on the way back */
    int64_t *choices;           /* [B] */
    const float *state;         /* [L, B, S] */
    float *final;
    const unsigned char *starts; /* [B] */
    const float *const *grad_outputs;
    float *const *grad_inputs;  /* NULL for those that nobody wants */
    float *const *grad_weights; /* by weight_index and bias_index */
    float *sums;                /* [n_shares, n_sums], zeros; NULL: forward */
    const PPOLossParams *surrogate;
    float *terms; /* [TERMS], summed over rows */
    int level, failed;
} Program;

/* Max pooling of n images [h, w, c] to [(h + 1) / 2, (w + 1) / 2, c]. */
typedef struct {
    int64_t n, h, w, c, grain, next;
    void *x, *y;          /* images and what they are pooled to; on the way back their gradients, x is written */
    unsigned char *which; /* like y: which of its nine pixels a window took; NULL: nobody will ask */
    int is_half, back;    /* bfloat16 instead of float; the way back */
} Pool;

#define STEP_8(job) /* has a function of its own, for AVX-512 */ \
    ((job)->T == 1 && (job)->D == 8 && (job)->E == 8 && !(job)->grad_x && !(job)->value && !HELD(job))
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
static Share sample(int is_double, int level, const Job *job);

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

/* Changes with Job, Op, PPOLossParams, Program, Pool, their kinds or the meaning of a call, so that a stale build is noticed. */
EXPORT int srwm_cpu_version(void) { return 7; }

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

static Share sample(int is_double, int level, const Job *job) {
#ifdef HAVE_X86
    if (is_double) return level >= 1 ? share_f64_avx2 : share_f64;
    if (level >= 2 && (job->D > 8 || STEP_8(job))) return share_f32_avx512; /* small heads would be mostly padding */
    if (level >= 1) return share_f32_avx2;
#else
    (void)level, (void)job;
#endif
    return is_double ? share_f64 : share_f32;
}

/* The kernel for groups of `lanes` pairs */
static Share choose_lanes(int lanes) {
#ifdef HAVE_X86
    if (lanes == 16) return lanes_share_f32_avx512;
    if (lanes == 8) return lanes_share_f32_avx2;
#else
    (void)lanes;
#endif
#if PORTABLE_VLEN > 1
    return lanes_share_f32;
#else
    return 0;
#endif
}

/* How many pairs to run at once; 0: one by one. Whether depends on the sizes alone. How many depends on the threads as
 * well: any number gives the same bits. */
static int lanes_for(const Job *job, int is_double, int level, unsigned threads) {
    const int64_t pairs = job->B * job->H, n = threads;
    if (is_double || job->value || HELD(job) || job->E != job->D || (job->D != 4 && job->D != 8)) return 0;
    if (job->T < 4 || pairs < 8) return 0; /* turning the states, and lanes without a pair, would cost too much */
    if (level < 1) return PORTABLE_VLEN > 1 ? PORTABLE_VLEN : 0;
    if (level < 2) return 8;
    /* Half as many lanes take three quarters of the time: worth it where no thread has more groups to run then. */
    return ((pairs + 7) / 8 + n - 1) / n > ((pairs + 15) / 16 + n - 1) / n ? 16 : 8;
}

/* Run the job; `parallel`: torch's own OpenMP entry, so that its threads do the work, or NULL. 1: out of memory. */
EXPORT int srwm_cpu_run(Job *job, int is_double, int level, unsigned threads, Parallel parallel) {
#if !defined(__GNUC__)
    parallel = 0;
#endif
    if (!parallel || !threads) threads = 1;
    const int lanes = lanes_for(job, is_double, level, threads);
    const int64_t each = lanes ? lanes : 1, units = (job->B * job->H + each - 1) / each;
    Share share = lanes ? choose_lanes(lanes) : sample(is_double, level, job);
    job->next = 0;
    job->failed = 0;
    if (threads < 2) {
        job->grain = units;
        share(job);
    } else {
        const int64_t shares = 4 * (int64_t)threads; /* several each: threads may be of unequal speed */
        job->grain = lanes ? 1 : (units + shares - 1) / shares;
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

static void play(Program *program, int level, unsigned threads, Parallel parallel) {
    program->next = 0;
    program->grain = 1;
    program->level = level;
    program->failed = 0;
    if (!program->B) return;
#if !defined(__GNUC__)
    parallel = 0;
#endif
    if (!parallel || threads < 2 || program->n_shares < 2)
        choose_play(level)(program);
    else
        parallel(choose_play(level), program, threads, 0);
}

/* Play all operations; arguments and result as of srwm_cpu_run. */
EXPORT int srwm_cpu_play(Program *program, int level, unsigned threads, Parallel parallel) {
    program->n_shares = (program->B + TILE - 1) / TILE;
    play(program, level, threads, parallel);
    return program->failed;
}

/* Add up the shares' sums, `lanes` numbers for each of the gradient's, always in the same order. */
static void add_up(const Program *program, int64_t at, int n_rows, int n, size_t row, int lanes, float *grad) {
    memset(grad, 0, (size_t)n_rows * n * sizeof(float));
    for (int64_t share = 0; share < program->n_shares; share++) {
        for (int r = 0; r < n_rows; r++) {
            const float *from = program->sums + share * program->n_sums + at + r * row;
            float *to = grad + (size_t)r * n;
            if (lanes == 1) {
                for (int i = 0; i < n; i++) to[i] += from[i];
            } else {
                for (int i = 0; i < n; i++) {
                    for (int lane = 0; lane < lanes; lane++) to[i] += from[(size_t)i * lanes + lane];
                }
            }
        }
    }
}

/* Play all operations again and go back through them. The shares depend on B alone: so do the gradients' last bits. */
EXPORT int srwm_cpu_play_back(Program *program, int level, unsigned threads, Parallel parallel) {
    const int64_t tiles = (program->B + TILE - 1) / TILE;
    program->n_shares = tiles < 8 ? 1 : tiles > 32 ? 8 : tiles / 4;
    float *block = calloc(program->n_shares * program->n_sums + LANES, sizeof(float));
    if (!block) return 1;
    program->sums = (float *)(((uintptr_t)block + 63) / 64 * 64);
    play(program, level, threads, parallel);
    for (const Op *op = program->ops; op < program->ops + program->n_ops; op++) {
        float *weight = op->weight_index < 0 ? 0 : program->grad_weights[op->weight_index];
        float *bias = op->bias_index < 0 ? 0 : program->grad_weights[op->bias_index];
        const size_t row = PADDED(op->n_in);
        if (op->kind == LINEAR) {
            add_up(program, op->sums, op->n_out, op->n_in, row, 1, weight);
            if (bias) add_up(program, op->sums + op->n_out * row, 1, op->n_out, 0, LANES, bias);
        } else if (op->kind == NORM) {
            add_up(program, op->sums, 1, op->n_in, 0, LANES, weight);
            add_up(program, op->sums + (int64_t)op->n_in * LANES, 1, op->n_in, 0, LANES, bias);
        } else if (op->kind == SURROGATE) {
            add_up(program, op->sums, 1, TERMS, 0, LANES, program->terms);
        }
    }
    free(block);
    return program->failed;
}

/* The kernel whose vectors divide the channels; NULL: there is none. */
static Share choose_pool(int64_t channels, int level) {
#ifdef HAVE_X86
    if (level >= 2 && channels % 16 == 0) return pool_share_f32_avx512;
    if (level >= 1 && channels % 8 == 0) return pool_share_f32_avx2;
#else
    (void)level;
#endif
#if PORTABLE_VLEN > 1
    if (channels % PORTABLE_VLEN == 0) return pool_share_f32;
#endif
    (void)channels;
    return 0;
}

/* Whether images of so many channels can be pooled. */
EXPORT int srwm_cpu_pools(int64_t channels, int level) { return choose_pool(channels, level) != 0; }

/* Pool images, or go back; arguments as of srwm_cpu_run. Only where srwm_cpu_pools says so. */
EXPORT void srwm_cpu_pool(Pool *pool, int level, unsigned threads, Parallel parallel) {
    Share share = choose_pool(pool->c, level);
    const int64_t units = pool->n * (pool->back ? pool->h : (pool->h + 1) / 2);
    pool->next = 0;
    if (!parallel || threads < 2) {
        pool->grain = units;
        share(pool);
    } else {
        const int64_t shares = 4 * (int64_t)threads;
        pool->grain = (units + shares - 1) / shares;
        parallel(share, pool, threads, 0);
    }
}

/* Windows' linker is told by setuptools to export a module's entry; this is no Python module. */
EXPORT void *PyInit__srwm_cpu(void) { return 0; }
