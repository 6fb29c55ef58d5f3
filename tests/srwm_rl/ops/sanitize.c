/* Runs the C kernels over many shapes on buffers of exactly the documented sizes, under a sanitizer. */
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
    Worker worker;
    void *data;
} Call;

static void *thread(void *call) {
    ((Call *)call)->worker(((Call *)call)->data);
    return 0;
}

/* Stands in for GOMP_parallel. */
static void parallel(Worker worker, void *data, unsigned threads, unsigned flags) {
    (void)flags;
    pthread_t ids[8];
    Call call = {worker, data};
    for (unsigned i = 1; i < threads; i++) pthread_create(&ids[i], 0, thread, &call);
    worker(data);
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
    if (srwm_cpu_scan(&job, is_double, level, 3, sparse ? 0 : parallel)) abort();
    job.grad_y = sparse ? 0 : y, job.grad_final = sparse ? 0 : final;
    job.grad_x = grad_x, job.grad_weight = grad_weight, job.grad_shift = sparse ? 0 : grad_shift;
    job.grad_retention = retained ? grad_retention : 0;
    if (srwm_cpu_scan(&job, is_double, level, 3, sparse ? 0 : parallel)) abort();
    void *all[] = {x, weight, shift, y, final, checkpoints, grad_x, grad_weight, grad_shift, retention, grad_retention,
                   starts};
    for (unsigned i = 0; i < sizeof(all) / sizeof(all[0]); i++) free(all[i]);
}

static void run_delta(int64_t T, int64_t B, int64_t H, int64_t D, int is_double, int level, int sparse) {
    int64_t steps = T * B * H * D, fast = B * H * D * D;
    void *inputs[] = {numbers(steps, is_double), numbers(steps, is_double), numbers(steps, is_double),
                     numbers(T * B * H, is_double), numbers(fast, is_double)}; /* key, value, query, rate, weight */
    void *outputs[] = {numbers(steps, is_double), numbers(fast, is_double), numbers((T - 1) / CHUNK * fast, is_double)};
    void *grads[] = {numbers(steps, is_double), numbers(steps, is_double), numbers(steps, is_double),
                     numbers(T * B * H, is_double), numbers(fast, is_double)};
    unsigned char *starts = malloc(T * B);
    for (int64_t i = 0; i < T * B; i++) starts[i] = uniform() > 0.3f;
    Job job = {.T = T, .B = B, .H = H, .D = D, .x = inputs[0], .value = inputs[1], .query = inputs[2], .rate = inputs[3]};
    if (!sparse) job.shift = inputs[4], job.starts = starts;
    job.y = outputs[0], job.final = outputs[1], job.checkpoints = outputs[2];
    if (srwm_cpu_scan(&job, is_double, level, 3, sparse ? 0 : parallel)) abort();
    job.grad_y = sparse ? 0 : outputs[0], job.grad_final = sparse ? 0 : outputs[1];
    job.grad_x = grads[0], job.grad_value = grads[1], job.grad_query = grads[2], job.grad_rate = grads[3];
    job.grad_shift = sparse ? 0 : grads[4];
    if (srwm_cpu_scan(&job, is_double, level, 3, sparse ? 0 : parallel)) abort();
    for (int i = 0; i < 5; i++) free(inputs[i]), free(grads[i]);
    for (int i = 0; i < 3; i++) free(outputs[i]);
    free(starts);
}

/* One acting step of a policy; or, without recurrence and sampling, its rows forward and backward. */
static void run_operations(int64_t B, int H, int D, int level, int back) {
    enum { SEEN = 5, PERIODS = 3, ACTIONS = 4 };
    const int width = H * D, state = width * (3 * D + 4);
    int at = 0;
    const int step = at++, seen = at, waves = at += SEEN, x = at += 2 * PERIODS, normed = at += width;
    const int soft = at += width + 2, y = at += width, out = at += width, logits = at += width, exp_noise = at += ACTIONS;
    const int action_stats = exp_noise + ACTIONS;
    const int n_features = action_stats + 3, joined = SEEN + 2 * PERIODS;
    float *project = numbers((int64_t)width * joined, 0), *bias = numbers(width, 0), *scale = numbers(width, 0);
    float *periods = numbers(PERIODS, 0), *slow = numbers(state, 0), *mix = numbers((int64_t)width * width, 0);
    float *head = numbers((int64_t)ACTIONS * width, 0);
    const int64_t padded = PADDED(joined), wide = PADDED(width);
    const int64_t sums[] = {0, width * (padded + LANES), width * (padded + 3 * LANES),
                            width * (padded + 3 * LANES) + width * (wide + LANES),
                            width * (padded + 3 * LANES) + (width + ACTIONS) * (wide + LANES)};
    const int from = back ? soft : y;
    Op all[] = {
        {INPUT, 0, 0, step, -1, 0, 1, 0, 0, -1, -1, 0, 0, 0, 0},
        {INPUT, 0, 0, seen, -1, 0, SEEN, 1, 0, -1, -1, 0, 0, 0, 0},
        {SINES, 0, step, waves, -1, 0, PERIODS, 0, 0, -1, -1, 0, 0, periods, 0},
        {LINEAR, TANH, seen, x, -1, joined, width, 0, 0, 0, 1, 0, sums[0], project, bias},
        {NORM, 0, x, normed, -1, width, 0, 0, 0, 2, 3, 1e-5f, sums[1], scale, bias},
        {SOFTMAX, 0, normed, soft, -1, width, D, 0, 0, -1, -1, 0, 0, 0, 0},
        {HEADS, 0, soft, y, normed, width, H, 0, 0, -1, -1, 2.0f, 0, slow, 0},
        {LINEAR, RELU, from, out, x, width, width, 0, 0, 4, -1, 0, sums[2], mix, 0},
        {LINEAR, 0, out, logits, -1, width, ACTIONS, 0, 0, 5, -1, 0, sums[3], head, 0},
        {INPUT, 0, 0, exp_noise, -1, 0, ACTIONS, 2, 0, -1, -1, 0, 0, 0, 0},
        {LOG_PROB_AND_ENTROPY, 0, logits, action_stats, step, ACTIONS, 0, 0, 0, -1, -1, 0, 0, 0, 0},
        {PPO_LOSS, 0, action_stats, exp_noise, logits, 0, 0, 0, 0, -1, -1, 0, sums[4], 0, 0},
        {OUTPUT, 0, out, out, -1, width, 0, 0, 0, -1, -1, 0, 0, 0, 0},
        {SAMPLE, 0, logits, logits, exp_noise, ACTIONS, 0, 1, 0, -1, -1, 0, 0, 0, 0},
    };
    enum { COUNT = sizeof(all) / sizeof(all[0]) };
    Op ops[COUNT];
    int n_ops = 0;
    for (int i = 0; i < COUNT; i++) {
        if (!back || (all[i].kind != HEADS && all[i].kind != SAMPLE)) ops[n_ops++] = all[i];
    }
    float *inputs[] = {numbers(B, 0), numbers(B * SEEN, 0), numbers(B * ACTIONS, 0)};
    float *outputs[] = {numbers(B * width, 0), numbers(B, 0)};
    float *grads[] = {numbers(B, 0), 0, numbers(B * ACTIONS, 0)}, *carried = numbers(B * state, 0);
    float *weights[] = {numbers((int64_t)width * joined, 0), numbers(width, 0), numbers(width, 0), numbers(width, 0),
                        numbers((int64_t)width * width, 0), numbers((int64_t)ACTIONS * width, 0)};
    float *final = numbers(B * state, 0);
    int64_t *actions = malloc(B * sizeof(int64_t));
    unsigned char *starts = malloc(B);
    for (int64_t i = 0; i < B; i++) starts[i] = uniform() > 0.3f;
    int scratch = 2 * width + H > (int)padded ? 2 * width + H : (int)padded;
    Program program = {.B = B, .n_ops = n_ops, .n_features = n_features, .n_scratch = scratch > wide ? scratch : (int)wide};
    program.ops = ops, program.inputs = (const float *const *)inputs, program.state_size = state;
    if (back) {
        const PPOLossParams params = {0.2f, 0.3f, 0.5f, 0.01f, 0.1f};
        float terms[TERMS];
        program.n_sums = sums[4] + TERMS * LANES;
        program.loss_params = &params, program.terms = terms;
        program.grad_outputs = (const float *const *)outputs, program.grad_inputs = grads, program.grad_weights = weights;
        if (srwm_cpu_program_backward(&program, level, 3, parallel)) abort();
    } else {
        program.outputs = outputs, program.actions = actions, program.state = carried, program.final = final, program.starts = starts;
        if (srwm_cpu_program_forward(&program, level, 3, parallel)) abort();
    }
    void *used[] = {project, bias, scale, periods, slow, mix, head, carried, final, actions, starts};
    for (unsigned i = 0; i < sizeof(used) / sizeof(used[0]); i++) free(used[i]);
    for (int i = 0; i < 3; i++) free(inputs[i]), free(grads[i]);
    for (int i = 0; i < 2; i++) free(outputs[i]);
    for (int i = 0; i < 6; i++) free(weights[i]);
}

static void run_pool(int64_t n, int64_t h, int64_t w, int64_t c, int is_half, int level) {
    const int64_t in = n * h * w * c, out = n * ((h + 1) / 2) * ((w + 1) / 2) * c;
    const size_t size = is_half ? 2 : 4;
    char *x = malloc(in * size), *y = malloc(out * size);
    for (size_t i = 0; i < in * size; i++) x[i] = (char)(uniform() * 256);
    unsigned char *which = malloc(out);
    Pool pool = {.n = n, .h = h, .w = w, .c = c, .x = x, .y = y, .which = which, .is_half = is_half};
    if (!srwm_cpu_can_max_pool(c, level)) abort();
    srwm_cpu_max_pool(&pool, level, 3, parallel);
    pool.back = 1;
    srwm_cpu_max_pool(&pool, level, 3, parallel);
    free(x), free(y), free(which);
}

/* level -1: on matrix tiles */
static void run_cnn(int level, int64_t n, int kind, int h, int w, int c_in, int c, int c_last) {
    const int k = kind == PATCHES ? 4 : 3, h_out = kind == PATCHES ? h / k : (h + 1) / 2;
    const int w_out = kind == PATCHES ? w / k : (w + 1) / 2;
    const Layer layers[] = {{kind, 0, k, h, w, c_in, h_out, w_out, c},
                            {BLOCK, 1, 3, h_out, w_out, c, h_out, w_out, c},
                            {CONV_AND_POOL, 3, 3, h_out, w_out, c, (h_out + 1) / 2, (w_out + 1) / 2, c_last}};
    const int64_t n_out = (int64_t)layers[2].h * layers[2].w * c_last;
    const int64_t sizes[] = {c * c_in * k * k, c * c * 9, c * c * 9, c_last * c * 9}, widths[] = {c, c, c, c_last};
    float *weights[4], *biases[4], *grad_weights[4], *grad_biases[4];
    for (int i = 0; i < 4; i++) {
        weights[i] = numbers(sizes[i], 0), grad_weights[i] = numbers(sizes[i], 0);
        biases[i] = numbers(widths[i], 0), grad_biases[i] = numbers(widths[i], 0);
    }
    uint8_t *frames = malloc(n * h * w * c_in);
    for (int64_t i = 0; i < n * h * w * c_in; i++) frames[i] = (uint8_t)(uniform() * 256);
    void *y = malloc(n * n_out * (level < 0 ? sizeof(uint16_t) : sizeof(float)));
    Cnn cnn = {.n = n, .n_layers = 3, .n_convs = 4, .layers = layers, .frames = frames, .y = y, .scale = 1.0f / 255,
               .weights = (const float *const *)weights, .biases = (const float *const *)biases,
               .grad_weights = grad_weights, .grad_biases = grad_biases};
    if (level >= 0) {
        if (srwm_cpu_vector_cnn(&cnn, level, 3, parallel)) abort();
        cnn.kept = malloc(n * srwm_cpu_cnn_kept(&cnn, level) * sizeof(float));
        if (srwm_cpu_vector_cnn(&cnn, level, 3, parallel)) abort();
        cnn.grad_y = y;
        if (srwm_cpu_vector_cnn(&cnn, level, 3, parallel)) abort();
    } else {
        if (srwm_cpu_tile_cnn(&cnn, 2, 3, parallel)) abort();
        cnn.grad_y = y;
        if (srwm_cpu_tile_cnn(&cnn, 2, 3, parallel)) abort();
    }
    for (int i = 0; i < 4; i++) free(weights[i]), free(biases[i]), free(grad_weights[i]), free(grad_biases[i]);
    free(frames), free(y), free(cnn.kept);
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
    for (int level = 0; level <= srwm_cpu_level(); level++) {
        for (int64_t pairs = 8; pairs < 70; pairs += 3) { /* lanes_kernel.h */
            for (int i = 1; i < 5; i++, runs++) {
                const int64_t H = pairs % 4 ? 1 : 4;
                run(steps[i] + 2, pairs / H, H, i % 2 ? 4 : 8, i % 2 ? 4 : 8, 0, level, pairs % 5 == 0, 0, 0);
            }
        }
    }
    int64_t rows[] = {1, 63, 64, 130, 1100};
    for (int level = 0; level <= srwm_cpu_level(); level++) {
        for (int i = 0; i < 5; i++) {
            for (int D = 1; D < 40; D += 5, runs++) {
                run_operations(rows[i], 1 + D % 3, D, level, 0);
                run_operations(rows[i], 1 + D % 3, D, level, 1);
            }
        }
    }
    for (int level = 0; level <= srwm_cpu_level(); level++) {
        for (int64_t h = 1; h < 9; h++) {
            for (int64_t w = 1; w < 9; w++) {
                for (int64_t c = 4; c < 50; c += c < 16 ? 4 : 16, runs += 2) {
                    run_pool(3, h, w, c, 0, level);
                    run_pool(3, h, w, c, 1, level);
                }
            }
        }
    }
    for (int level = srwm_cpu_has_tiles() ? -1 : 0; level <= srwm_cpu_level(); level++) {
        for (int h = 4; h < 40; h += 5) {
            for (int w = 4; w < 70; w += 13, runs += 2) {
                run_cnn(level, 70, CONV_AND_POOL, h, w, 1 + h % 5, h % 2 ? 16 : 48, 32);
                run_cnn(level, 5, PATCHES, h, w, 1 + w % 4, w % 2 ? 16 : 32, 16);
            }
        }
        for (int h = 8; level >= 0 && h < 50; h += 8, runs += 2) { /* by tiles of 4 x 4 pixels */
            run_cnn(level, 40, CONV_AND_POOL, h, 56 - h, 3, h % 16 ? 8 : 40, 24);
            run_cnn(level, 3, PATCHES, 2 * h, 2 * h, 1 + h % 3, 8 + h % 16, 8);
        }
    }
    printf("%d runs, levels 0 to %d: clean\n", runs, srwm_cpu_level());
    return 0;
}
