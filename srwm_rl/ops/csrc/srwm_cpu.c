/* The recurrences, the short convolution, the row-wise parts of a small network, max pooling and CNNs on the CPU: plain C,
 * without headers of Python or torch, called through ctypes.
 *
 * kernels.h includes the algorithms. They are compiled for float, the recurrences one pair at a time also for double, each
 * portably and, on x86 with GCC or clang, for AVX2 and AVX-512; the caller passes the level to run, at most
 * srwm_cpu_level().
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

enum { TILE = 64, LANES = 16 }; /* rows that a program processes at once; numbers in the longest vector */
enum { INPUT, OUTPUT, LINEAR, NORM, SOFTMAX, LOG_PROB_AND_ENTROPY, PPO_LOSS, SINES, HEADS, SAMPLE, SHORT_CONV };
enum { TERMS = 5 }; /* policy loss, value loss, entropy, approximate KL divergence, how often the ratio was clipped */
enum { IDENTITY, RELU, SIGMOID, TANH };
#define PADDED(n) (((size_t)(n) + LANES - 1) / LANES * LANES)

/* An operation on the features of a tile. `from`, `to`, `add`: the first feature of each operand, -1: none.
 *   INPUT     to = inputs[index], n_out columns
 *   OUTPUT    outputs[index] = from, n_in columns
 *   LINEAR    to = activation(weight from + bias + add); weight [n_out, n_in], bias [n_out] or NULL
 *   NORM      to = layer norm of from, n_in; weight and bias [n_in], number: added to the variance
 *   SOFTMAX   to = softmax of from, within each n_out of n_in
 *   LOG_PROB_AND_ENTROPY  to = the log-probability of the action `add`, one feature, by n_in logits, and their entropy
 *   PPO_LOSS  the loss of PPO, in backward only, of the log-probability and entropy `from` and the value `add`, by four
 *             features from `to` on: the rollout's log-probability, advantage, return and value
 *   SINES     to = n_out sines, then as many cosines, of one feature by its periods, weight [n_out]
 *   HEADS     to = the output of the n_out heads of layer `index` for from, n_in; weight [H, D, 3D+4], number: the bound,
 *             add: retention
 *   SAMPLE    actions and outputs[index], their log-probabilities, from n_in logits and as many exp_noise, add
 *   SHORT_CONV  to = the short convolution of from, n_in, with n_out taps, weight [n_out, n_in]; earlier inputs are stored
 *             from number `index` on in the first layer's state, behind that of its heads
 * The last four have no backward pass.
 */
typedef struct {
    int32_t kind, activation, from, to, add, n_in, n_out, index;
    int32_t is_leaf, weight_index, bias_index; /* is_leaf: from needs no gradient; indices into grad_weights, -1: none */
    float number;
    int64_t sums; /* the offset of this operation's gradients in a share's sums */
    const float *weight, *bias;
} Op;

/* The settings of PPO's loss: the gradient is that of (policy loss + vf_coef * value loss - ent_coef * entropy) * scale,
 * each summed over rows. */
typedef struct {
    float clip_range, clip_range_vf; /* the latter below 0: values are not clipped */
    float vf_coef, ent_coef, scale;
} PPOLossParams;

typedef struct {
    int64_t B, n_ops, n_features, n_scratch, n_sums, n_shares, next, grain; /* n_scratch: additional features */
    int64_t state_size; /* S: the numbers of a layer's heads, then those of a short convolution, if there is one */
    const Op *ops;
    const float *const *inputs; /* [B, n] each */
    float *const *outputs;      /* [B, n] each; NULL in backward */
    int64_t *actions;           /* [B] */
    const float *state;         /* [L, B, S] */
    float *final;
    const unsigned char *starts; /* [B] */
    const float *const *grad_outputs;
    float *const *grad_inputs;  /* NULL: not needed */
    float *const *grad_weights; /* by weight_index and bias_index */
    float *sums;                /* [n_shares, n_sums], zeros; NULL in forward */
    const PPOLossParams *loss_params;
    float *terms; /* [TERMS], summed over rows */
    int level, failed;
} Program;

/* A causal depthwise convolution with W taps; state and final [B, W - 1, C] are the last inputs, the newest first. */
typedef struct {
    int64_t T, B, C, W;
    const float *x, *weight, *state;     /* [T, B, C], [W, C] */
    const unsigned char *starts;         /* [T, B] */
    float *y, *final;                    /* NULL in backward */
    const float *grad_y, *grad_final;    /* either may be NULL: zeros */
    float *grad_x, *grad_weight, *grad_state; /* added to */
} Conv;

/* Max pooling of n images [h, w, c] to [(h + 1) / 2, (w + 1) / 2, c]. */
typedef struct {
    int64_t n, h, w, c, grain, next;
    void *x, *y;          /* images and pooled images; in backward their gradients, x is the output */
    unsigned char *which; /* like y: the index of the pixel that each window took, of nine; NULL: not stored */
    int is_half, back;    /* bfloat16 instead of float; backward */
    int64_t x_row, y_row; /* pixels from one row to the next; set by srwm_cpu_max_pool */
} Pool;

/* A part of a CNN: a convolution of 3 x 3 followed by max pooling; one of patches, `kernel` pixels wide, that do not
 * overlap; or a residual block, x + conv(relu(conv(relu(x)))). `conv`: the index of its first convolution. */
enum { CONV_AND_POOL, PATCHES, BLOCK };
typedef struct {
    int32_t kind, conv, kernel, h_in, w_in, c_in, h, w, c;
} Layer;

/* A CNN of frames; on matrix tiles y and grad_y are bfloat16, else float. */
enum { MOST_LAYERS = 64, MOST_SUMS = 1 << 23 };
typedef struct {
    int64_t n, n_layers, n_convs, n_shares, grain, next;
    const Layer *layers;
    const uint8_t *frames; /* [n, h, w, c] of the first layer's input */
    void *y;               /* [n, c * h * w] of the last layer's output, rectified: channels first */
    const void *grad_y;    /* NULL: forward */
    const float *const *weights, *const *biases; /* [c, c_in, kernel, kernel] and [c] of each convolution */
    float *const *grad_weights, *const *grad_biases;
    float *kept; /* [n, srwm_cpu_cnn_kept()], written by forward for backward; NULL, or on tiles: nothing is kept */
    float scale; /* of the frames' numbers */
    int failed;
    void *prepared; /* while it runs */
} Cnn;

#define CONSTRAINED(job) ((job)->bound > 0 || (job)->retention) /* needs constrained_kernel.h */

#if defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#ifndef ALWAYS_INLINE /* the sanitizers' build sets it empty: with inlining it would compile for minutes */
#define ALWAYS_INLINE __attribute__((always_inline))
#endif
#define NOINLINE __attribute__((noinline))
#define TAKE(job) __atomic_fetch_add(&(job)->next, (job)->grain, __ATOMIC_RELAXED)
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#define UNROLL_12 UNROLL
#define SHUF(ivec, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL_12 _Pragma("GCC unroll 12")
#define SHUF(ivec, a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors never leave this file */
#define PORTABLE_VLEN 4
#else
#define EXPORT __declspec(dllexport)
#define ALWAYS_INLINE
#define NOINLINE __declspec(noinline)
#define TAKE(job) (((job)->next += (job)->grain) - (job)->grain) /* one thread: see run_parallel */
#define UNROLL
#define PORTABLE_VLEN 1
#endif
#define ALIGN(block) (((uintptr_t)(block) + 63) / 64 * 64)
#define SELECT(mask, x, y) NAME(select)((ivec)(mask), x, y)
#define WHERE(mask, x) SELECT(mask, x, ZERO)

typedef void (*Worker)(void *);
typedef void (*Parallel)(Worker, void *, unsigned threads, unsigned flags); /* GOMP_parallel */
static Worker scan_worker(int is_double, int level, int64_t D);

static inline int starts_at(const Job *job, int64_t t, int64_t batch) {
    return job->starts && job->starts[t * job->B + batch];
}

/* A span is a range of steps inside one chunk, without resets but at its first step: the end of the one from `begin` on */
static inline int64_t span_end(const Job *job, int64_t begin, int64_t batch) {
    int64_t end = begin + 1;
    while (end < job->T && end % CHUNK && !starts_at(job, end, batch)) end++;
    return end;
}

/* The first step of the span before `end` */
static inline int64_t span_begin(const Job *job, int64_t end, int64_t batch) {
    int64_t begin = end - 1;
    while (begin % CHUNK && !starts_at(job, begin, batch)) begin--;
    return begin;
}

/* Run a worker; parallel: torch's own OpenMP entry, so that torch's threads do the work, or NULL: the calling thread. */
static void run_parallel(Worker worker, void *job, unsigned threads, Parallel parallel) {
#if defined(__GNUC__)
    if (parallel && threads > 1) {
        parallel(worker, job, threads, 0);
        return;
    }
#endif
    worker(job);
}

#if PORTABLE_VLEN > 1
#include "vector_cnn.h"
#endif
#include "simd.h"

#define IS_DOUBLE 0
#define VLEN PORTABLE_VLEN
#define SUFFIX _f32
#define TARGET
#include "kernels.h"

#define IS_DOUBLE 1
#define VLEN 1
#define SUFFIX _f64
#define TARGET
#include "kernels.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define HAVE_X86
#include <immintrin.h>
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAVE_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define IS_DOUBLE 0
#define VLEN 8
#define SUFFIX _f32_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "kernels.h"

#define IS_DOUBLE 1
#define VLEN 4
#define SUFFIX _f64_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "kernels.h"

#define IS_DOUBLE 0
#define VLEN 16
#define SUFFIX _f32_avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#include "kernels.h"

#define BY_LEVEL(name) {name##_f32, name##_f32_avx2, name##_f32_avx512}
#else
#define BY_LEVEL(name) {name##_f32}
#endif

/* Increased with every change of a struct, enum or exported function, so that a stale build is detected. */
EXPORT int srwm_cpu_version(void) { return 13; }

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

/* The grain with which `units` of work are taken: several times per thread, as threads may differ in speed */
static int64_t grain_of(int64_t units, unsigned threads) {
    const int64_t shares = threads > 1 ? 4 * (int64_t)threads : 1;
    return (units + shares - 1) / shares;
}

static Worker scan_worker(int is_double, int level, int64_t D) {
    static const Worker floats[] = BY_LEVEL(scan_worker);
    /* With AVX-512, vectors of small heads would be mostly padding. */
    if (!is_double) return floats[level > 1 && D <= 8 ? 1 : level];
#ifdef HAVE_X86
    if (level) return scan_worker_f64_avx2;
#endif
    return scan_worker_f64;
}

/* The number of pairs to run at once in lanes_kernel.h; 0: one by one. Whether depends on the sizes alone; how many
 * depends on the threads as well, and does not change the results' bits. */
static int lanes_for(const Job *job, int is_double, int level, unsigned threads) {
    const int64_t pairs = job->B * job->H, n = threads;
    if (is_double || job->value || CONSTRAINED(job) || job->E != job->D || (job->D != 4 && job->D != 8)) return 0;
    if (job->T < 4 || pairs < 8) return 0; /* transposes, and lanes without a pair, would cost too much */
    if (level < 1) return PORTABLE_VLEN > 1 ? PORTABLE_VLEN : 0;
    if (level < 2) return 8;
    /* 8 lanes take three quarters of the time of 16: faster where no thread has more groups to run then. */
    return ((pairs + 7) / 8 + n - 1) / n > ((pairs + 15) / 16 + n - 1) / n ? 16 : 8;
}

/* Run a recurrence, with torch's threads unless `parallel` is NULL. Return 1 without memory. */
EXPORT int srwm_cpu_scan(Job *job, int is_double, int level, unsigned threads, Parallel parallel) {
    if (!parallel || !threads) threads = 1;
    const int lanes = lanes_for(job, is_double, level, threads);
    Worker worker = scan_worker(is_double, level, job->D);
    job->next = job->failed = 0;
    job->grain = grain_of(job->B * job->H, threads);
#if PORTABLE_VLEN > 1
    static const Worker by_lanes[] = BY_LEVEL(lanes_worker);
    if (lanes) {
        worker = by_lanes[lanes / 8];
        job->grain = threads > 1 ? 1 : job->B * job->H;
    }
#endif
    run_parallel(worker, job, threads, parallel);
    return job->failed;
}

static void run_program(Program *program, int level, unsigned threads, Parallel parallel) {
    static const Worker workers[] = BY_LEVEL(program_worker);
    program->next = program->failed = 0;
    program->grain = 1;
    program->level = level;
    if (program->B) run_parallel(workers[level], program, program->n_shares < 2 ? 1 : threads, parallel);
}

/* Run all operations; arguments and result as of srwm_cpu_scan. */
EXPORT int srwm_cpu_program_forward(Program *program, int level, unsigned threads, Parallel parallel) {
    program->n_shares = (program->B + TILE - 1) / TILE;
    run_program(program, level, threads, parallel);
    return program->failed;
}

/* grad [n_rows][n] = the shares' sums, `lanes` numbers each, always added in the same order */
static void reduce_sums(const Program *program, int64_t at, int n_rows, int n, size_t row, int lanes, float *grad) {
    memset(grad, 0, (size_t)n_rows * n * sizeof(float));
    for (int64_t share = 0; share < program->n_shares; share++) {
        for (int r = 0; r < n_rows; r++) {
            const float *from = program->sums + share * program->n_sums + at + r * row;
            for (int i = 0; i < n; i++) {
                for (int lane = 0; lane < lanes; lane++) grad[(size_t)r * n + i] += from[(size_t)i * lanes + lane];
            }
        }
    }
}

/* Run all operations forward and backward. The number of shares, and so the gradients' last bits, depends on B alone. */
EXPORT int srwm_cpu_program_backward(Program *program, int level, unsigned threads, Parallel parallel) {
    const int64_t tiles = (program->B + TILE - 1) / TILE;
    program->n_shares = tiles < 8 ? 1 : tiles > 32 ? 8 : tiles / 4;
    float *block = calloc(program->n_shares * program->n_sums + LANES, sizeof(float));
    if (!block) return 1;
    program->sums = (float *)ALIGN(block);
    run_program(program, level, threads, parallel);
    for (const Op *op = program->ops; op < program->ops + program->n_ops; op++) {
        float *weight = op->weight_index < 0 ? 0 : program->grad_weights[op->weight_index];
        float *bias = op->bias_index < 0 ? 0 : program->grad_weights[op->bias_index];
        const size_t row = PADDED(op->n_in);
        if (op->kind == LINEAR) {
            reduce_sums(program, op->sums, op->n_out, op->n_in, row, 1, weight);
            if (bias) reduce_sums(program, op->sums + op->n_out * row, 1, op->n_out, 0, LANES, bias);
        } else if (op->kind == NORM) {
            reduce_sums(program, op->sums, 1, op->n_in, 0, LANES, weight);
            reduce_sums(program, op->sums + (int64_t)op->n_in * LANES, 1, op->n_in, 0, LANES, bias);
        } else if (op->kind == PPO_LOSS) {
            reduce_sums(program, op->sums, 1, TERMS, 0, LANES, program->terms);
        }
    }
    free(block);
    return program->failed;
}

typedef void (*Convolve)(const Conv *);

/* Run a short convolution, one thread. */
EXPORT void srwm_cpu_short_conv_forward(const Conv *conv, int level) {
    static const Convolve functions[] = BY_LEVEL(short_conv_forward);
    functions[level](conv);
}

/* Add the gradients of a short convolution, one thread. */
EXPORT void srwm_cpu_short_conv_backward(const Conv *conv, int level) {
    static const Convolve functions[] = BY_LEVEL(short_conv_backward);
    functions[level](conv);
}

/* The highest level whose vectors divide a number of channels; -1: none */
static int level_for(int64_t channels, int level) {
    for (; level >= 0 && (PORTABLE_VLEN == 1 || channels % (PORTABLE_VLEN << level)); level--) continue;
    return level;
}

/* Whether images of so many channels can be pooled. */
EXPORT int srwm_cpu_can_max_pool(int64_t channels, int level) { return level_for(channels, level) >= 0; }

/* Pool images, or backward; arguments as of srwm_cpu_scan. Requires srwm_cpu_can_max_pool. */
EXPORT void srwm_cpu_max_pool(Pool *pool, int level, unsigned threads, Parallel parallel) {
#if PORTABLE_VLEN > 1
    static const Worker workers[] = BY_LEVEL(max_pool_worker);
    pool->next = 0;
    pool->grain = grain_of(pool->n * (pool->back ? pool->h : (pool->h + 1) / 2), parallel ? threads : 1);
    pool->x_row = pool->w, pool->y_row = (pool->w + 1) / 2;
    run_parallel(workers[level_for(pool->c, level)], pool, threads, parallel);
#else
    (void)pool, (void)level, (void)threads, (void)parallel;
#endif
}

#ifdef HAVE_TILES
#include "tile_cnn_kernel.h"
#endif

/* Whether a CNN can be run on matrix tiles; then once and for the whole process. */
EXPORT int srwm_cpu_has_tiles(void) {
#ifdef HAVE_TILES
    return srwm_cpu_level() == 2 && has_tiles();
#else
    return 0;
#endif
}

/* Run a CNN on matrix tiles, or its gradient, with torch's threads unless `parallel` is NULL. Return 1 without memory.
 * Requires srwm_cpu_has_tiles. */
EXPORT int srwm_cpu_tile_cnn(Cnn *cnn, int level, unsigned threads, Parallel parallel) {
    (void)level;
#ifdef HAVE_TILES
    return run_tile_cnn(cnn, threads, parallel);
#else
    return (void)cnn, (void)threads, (void)parallel, 1;
#endif
}

/* The numbers that forward keeps of a frame; 0: the vectors of no level divide the widths of such a CNN. */
EXPORT int64_t srwm_cpu_cnn_kept(const Cnn *cnn, int level) {
    for (int k = 0; k < cnn->n_layers; k++) level = level_for(cnn->layers[k].c, level);
#if PORTABLE_VLEN > 1
    return level < 0 ? 0 : (int64_t)lay_out_kept(cnn, 0, 0);
#else
    return 0;
#endif
}

/* Run a CNN in float, or its gradient; as srwm_cpu_tile_cnn. Requires srwm_cpu_cnn_kept. */
EXPORT int srwm_cpu_vector_cnn(Cnn *cnn, int level, unsigned threads, Parallel parallel) {
#if PORTABLE_VLEN > 1
    static const Worker workers[] = BY_LEVEL(vector_cnn_worker);
    for (int k = 0; k < cnn->n_layers; k++) level = level_for(cnn->layers[k].c, level);
    return run_vector_cnn(cnn, workers[level], threads, parallel);
#else
    return (void)cnn, (void)level, (void)threads, (void)parallel, 1;
#endif
}

/* setuptools tells Windows' linker to export a Python module's entry. */
EXPORT void *PyInit__srwm_cpu(void) { return 0; }
