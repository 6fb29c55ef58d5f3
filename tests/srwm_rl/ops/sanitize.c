/* Runs the C kernel over many shapes on buffers of exactly the documented sizes, for the sanitizers to watch. */
#include <pthread.h>
#include <stdio.h>

#include "srwm_cpu.c"

static unsigned seed = 1;
static float uniform(void) { return (float)((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 24) - 0.5f; }

static void *numbers(int64_t count, int is_double) {
    void *block = malloc(count * (is_double ? sizeof(double) : sizeof(float)));
    for (int64_t i = 0; i < count; i++) {
        if (is_double) ((double *)block)[i] = uniform();
        else ((float *)block)[i] = uniform();
    }
    return block;
}

typedef struct {
    Share share;
    void *data;
} Call;

static void *thread(void *call) {
    ((Call *)call)->share(((Call *)call)->data);
    return 0;
}

/* Stands in for GOMP_parallel. */
static void parallel(Share share, void *data, unsigned threads, unsigned flags) {
    (void)flags;
    pthread_t ids[8];
    Call call = {share, data};
    for (unsigned i = 1; i < threads; i++) pthread_create(&ids[i], 0, thread, &call);
    share(data);
    for (unsigned i = 1; i < threads; i++) pthread_join(ids[i], 0);
}

static void run(int64_t T, int64_t B, int64_t H, int64_t D, int64_t E, int is_double, int level, int sparse,
                double bound, int retained) {
    int64_t steps = T * B * H, fast = B * H * D * (E + 2 * D + 4);
    void *x = numbers(steps * D, is_double), *weight = numbers(fast / B, is_double), *shift = numbers(fast, is_double);
    void *y = numbers(steps * E, is_double), *final = numbers(fast, is_double);
    void *checkpoints = numbers((T - 1) / CHUNK * fast, is_double), *grad_x = numbers(steps * D, is_double);
    void *grad_weight = numbers(fast, is_double), *grad_shift = numbers(fast, is_double);
    void *retention = numbers(steps, is_double), *grad_retention = numbers(steps, is_double);
    unsigned char *starts = malloc(T * B);
    for (int64_t i = 0; i < T * B; i++) starts[i] = uniform() > 0.3f;
    Job job = {.T = T, .B = B, .H = H, .D = D, .E = E, .bound = bound, .x = x, .weight = weight, .y = y, .final = final};
    if (!sparse) job.shift = shift, job.starts = starts;
    if (retained) job.retention = retention;
    job.checkpoints = checkpoints;
    if (srwm_cpu_run(&job, is_double, level, 3, sparse ? 0 : parallel)) abort();
    job.grad_y = sparse ? 0 : y, job.grad_final = sparse ? 0 : final;
    job.grad_x = grad_x, job.grad_weight = grad_weight, job.grad_shift = sparse ? 0 : grad_shift;
    job.grad_retention = retained ? grad_retention : 0;
    if (srwm_cpu_run(&job, is_double, level, 3, sparse ? 0 : parallel)) abort();
    void *all[] = {x, weight, shift, y, final, checkpoints, grad_x, grad_weight, grad_shift, retention, grad_retention,
                   starts};
    for (unsigned i = 0; i < sizeof(all) / sizeof(all[0]); i++) free(all[i]);
}

static void run_delta(int64_t T, int64_t B, int64_t H, int64_t D, int is_double, int level, int sparse) {
    int64_t steps = T * B * H * D, fast = B * H * D * D;
    void *given[] = {numbers(steps, is_double), numbers(steps, is_double), numbers(steps, is_double),
                     numbers(T * B * H, is_double), numbers(fast, is_double)}; /* key, value, query, rate, weight */
    void *made[] = {numbers(steps, is_double), numbers(fast, is_double), numbers((T - 1) / CHUNK * fast, is_double)};
    void *grads[] = {numbers(steps, is_double), numbers(steps, is_double), numbers(steps, is_double),
                     numbers(T * B * H, is_double), numbers(fast, is_double)};
    unsigned char *starts = malloc(T * B);
    for (int64_t i = 0; i < T * B; i++) starts[i] = uniform() > 0.3f;
    Job job = {.T = T, .B = B, .H = H, .D = D, .x = given[0], .value = given[1], .query = given[2], .rate = given[3]};
    if (!sparse) job.shift = given[4], job.starts = starts;
    job.y = made[0], job.final = made[1], job.checkpoints = made[2];
    if (srwm_cpu_run(&job, is_double, level, 3, sparse ? 0 : parallel)) abort();
    job.grad_y = sparse ? 0 : made[0], job.grad_final = sparse ? 0 : made[1];
    job.grad_x = grads[0], job.grad_value = grads[1], job.grad_query = grads[2], job.grad_rate = grads[3];
    job.grad_shift = sparse ? 0 : grads[4];
    if (srwm_cpu_run(&job, is_double, level, 3, sparse ? 0 : parallel)) abort();
    for (int i = 0; i < 5; i++) free(given[i]), free(grads[i]);
    for (int i = 0; i < 3; i++) free(made[i]);
    free(starts);
}

int main(void) {
    int64_t steps[] = {1, 2, 16, 17, 40};
    int runs = 0;
    for (int level = 0; level <= srwm_cpu_level(); level++) {
        for (int is_double = 0; is_double < 2; is_double++) {
            for (int64_t D = 1; D <= 70; D += D < 34 ? 1 : 5) {
                for (int i = 0; i < 5; i++, runs++) {
                    int sparse = (D + i) % 3 == 0;
                    int64_t E = (D * 7 + i) % 90 + 1;
                    run(steps[i], 2, 3, D, D, is_double, level, sparse, 0, 0);
                    run(steps[i], 2, 3, D, E, is_double, level, sparse, 0, 0);
                    run(steps[i], 2, 3, D, i % 2 ? D : E, is_double, level, sparse, i % 4 ? 0.5 : 0, 1);
                    run(steps[i], 2, 3, D, i % 2 ? E : D, is_double, level, sparse, 1, 0);
                    run_delta(steps[i], 2, 3, D, is_double, level, sparse);
                }
            }
        }
    }
    printf("%d runs, levels 0 to %d: clean\n", runs, srwm_cpu_level());
    return 0;
}
