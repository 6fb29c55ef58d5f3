/* All kernels for one number type and vector width, and the functions that a thread runs; srwm_cpu.c includes this once for
 * each pair, with the macros set that simd.h lists.
 */

#include "math_kernel.h"
#include "srwm_kernel.h"
#include "constrained_kernel.h"
#include "delta_kernel.h"

/* A function for each recurrence, direction and head size: in a single one the compiler runs out of registers. Common
 * sizes get loops of constant length. */
#define FUNCTION(name, kind, ...)                                                                  \
    static NOINLINE TARGET void NAME(name)(const Job *job, const NAME(work) *work, int64_t pair) { \
        NAME(kind)(__VA_ARGS__, job, work, pair);                                                  \
    }
#define FUNCTIONS(n, D, E)                             \
    FUNCTION(forward_##n, forward_pair, D, E)          \
    FUNCTION(backward_##n, backward_pair, D, E)        \
    FUNCTION(delta_forward_##n, delta_forward_pair, D) \
    FUNCTION(delta_backward_##n, delta_backward_pair, D)
#if !IS_DOUBLE
FUNCTIONS(8, 8, 8)
FUNCTIONS(16, 16, 16)
FUNCTIONS(32, 32, 32)
#endif
FUNCTIONS(any, (int)job->D, (int)job->E)

typedef void (*NAME(function))(const Job *, const NAME(work) *, int64_t);

static NAME(function) NAME(function_of)(const Job *job) {
#define CASE(n)                                                                          \
    return job->value ? job->grad_x ? NAME(delta_backward_##n) : NAME(delta_forward_##n) \
                      : job->grad_x ? NAME(backward_##n) : NAME(forward_##n)
    if (CONSTRAINED(job)) return job->grad_x ? NAME(constrained_backward_pair) : NAME(constrained_forward_pair);
    switch (job->value || job->E == job->D ? job->D : 0) {
#if !IS_DOUBLE
        case 8: CASE(8);
        case 16: CASE(16);
        case 32: CASE(32);
#endif
        default: CASE(any);
    }
#undef CASE
}

/* Run pairs until none is left. */
static TARGET void NAME(scan_worker)(void *data) {
    Job *job = (Job *)data;
    const NAME(function) run = NAME(function_of)(job);
    NAME(work) work;
    if (!NAME(work_new)(&work, (int)job->D, (int)(job->value ? job->D : job->E), job->grad_x != 0, CONSTRAINED(job))) {
        job->failed = 1;
        return;
    }
    for (int64_t from; (from = TAKE(job)) < job->B * job->H;) {
        for (int64_t pair = from; pair < from + job->grain && pair < job->B * job->H; pair++) run(job, &work, pair);
    }
    free(work.block);
}

#if !IS_DOUBLE
#include "transpose_kernel.h"
#include "short_conv_kernel.h"
#include "program_kernel.h"
#if VLEN > 1
#include "lanes_kernel.h"
#include "max_pool_kernel.h"
#include "vector_cnn_kernel.h"
#endif
#endif

#undef IS_DOUBLE
#undef VLEN
#undef SUFFIX
#undef TARGET
