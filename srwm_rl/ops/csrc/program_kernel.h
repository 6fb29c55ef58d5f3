/* A program, a list of row-wise operations, forward and backward in single precision: the network between the
 * recurrences of a policy, or one step of a whole policy.
 *
 * Rows are processed in tiles of 64. A tile is [features][TILE]: every operation runs along whole vectors of rows, reads
 * weights in torch's layout, and rarely sums across lanes. Every operation writes to features of its own, so backward
 * recomputes the tile and has all intermediate results.
 */

#define EACH(c) for (int c = 0; c < TILE; c += VLEN)
#define AT(features, i) ((features) + (size_t)(i) * TILE)

/* to [width][TILE] = from [n, width]; zeros in the tile's padding rows */
INLINE void NAME(load_transposed)(const REAL *from, int n, int width, REAL *to) {
    NAME(transpose)(from, width, n, width, to, TILE);
    if (n < TILE) {
        for (int i = 0; i < width; i++) memset(AT(to, i) + n, 0, (TILE - n) * sizeof(REAL));
    }
}

/* to [n, width] = from [width][TILE] */
INLINE void NAME(store_transposed)(const REAL *from, int n, int width, REAL *to) {
    NAME(transpose)(from, TILE, width, n, to, width);
}

/* ---- matrix products ---- */

#define PRODUCT_ROWS (VLEN == 16 ? 6 : 4) /* a block of rows and vectors whose sums fit the registers */
#define PRODUCT_VECS (VLEN == 16 ? 4 : VLEN == 1 ? 1 : 2)

/* out[r] += sum_j factor[r][j] in[j], for `vecs` vectors; *_row and *_step are the strides of r and j. */
INLINE void NAME(product_block)(int n, int rows, int vecs, const REAL *factor, size_t factor_row, size_t factor_step,
                                const REAL *in, size_t in_step, REAL *out, size_t out_row) {
    vec sum[6][4];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vecs; v++) sum[r][v] = LD(out + r * out_row + v * VLEN);
    }
    for (int j = 0; j < n; j++, in += in_step, factor += factor_step) {
        vec x[4];
        UNROLL for (int v = 0; v < vecs; v++) x[v] = LD(in + v * VLEN);
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int v = 0; v < vecs; v++) sum[r][v] += x[v] * factor[r * factor_row];
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vecs; v++) ST(out + r * out_row + v * VLEN, sum[r][v]);
    }
}

/* out [n_rows][width] += factor [n_rows, n] in [n][width] */
static TARGET void NAME(product)(int n_rows, int n, int width, const REAL *factor, size_t factor_row,
                                 size_t factor_step, const REAL *in, size_t in_step, REAL *out, size_t out_row) {
    int c = 0;
#define CALL(rows, vecs)                                                                                         \
    NAME(product_block)(n, rows, vecs, factor + r * factor_row, factor_row, factor_step, in + c, in_step,       \
                        out + r * out_row + c, out_row)
#define PRODUCT_COLUMNS(vecs)                                                                     \
    for (; c + (vecs) * VLEN <= width; c += (vecs) * VLEN) {                              \
        int r = 0;                                                                        \
        for (; r + PRODUCT_ROWS <= n_rows; r += PRODUCT_ROWS) CALL(PRODUCT_ROWS, vecs);   \
        for (; r + 2 <= n_rows; r += 2) CALL(2, vecs);                                    \
        if (r < n_rows) CALL(1, vecs);                                                    \
    }
    PRODUCT_COLUMNS(PRODUCT_VECS)
    if (PRODUCT_VECS == 4) PRODUCT_COLUMNS(2)
    PRODUCT_COLUMNS(1)
#undef PRODUCT_COLUMNS
#undef CALL
}

/* ---- forward ---- */

/* x is VMAX's second argument, so that NaN stays NaN. */
INLINE vec NAME(activated)(vec x, int activation) {
    switch (activation) {
        case RELU: return VMAX(ZERO, x);
        case SIGMOID: return NAME(sigmoid)(x);
        case TANH: {
            vec half = NAME(sigmoid)(x + x);
            return half + half - 1;
        }
        default: return x;
    }
}

static TARGET void NAME(linear)(const Op *op, const REAL *in, const REAL *add, REAL *out) {
    for (int i = 0; i < op->n_out; i++) {
        EACH(c) {
            vec begin = ZERO + (op->bias ? op->bias[i] : 0);
            if (add) begin += LD(AT(add, i) + c);
            ST(AT(out, i) + c, begin);
        }
    }
    NAME(product)(op->n_out, op->n_in, TILE, op->weight, op->n_in, 1, in, TILE, out, TILE);
    if (op->activation != IDENTITY) {
        for (int i = 0; i < op->n_out; i++) {
            EACH(c) ST(AT(out, i) + c, NAME(activated)(LD(AT(out, i) + c), op->activation));
        }
    }
}

/* Two more features follow the n_in of `out`, for backward: the mean and the inverse standard deviation. */
static TARGET void NAME(norm)(const Op *op, const REAL *in, REAL *out) {
    const int n = op->n_in;
    REAL *mean = AT(out, n), *scale = AT(out, n + 1);
    EACH(c) {
        vec sum = ZERO, squares = ZERO;
        for (int i = 0; i < n; i++) sum += LD(AT(in, i) + c);
        sum /= (REAL)n;
        for (int i = 0; i < n; i++) {
            vec d = LD(AT(in, i) + c) - sum;
            squares += d * d;
        }
        ST(mean + c, sum);
        ST(scale + c, squares / (REAL)n + op->number);
    }
    for (int c = 0; c < TILE; c++) scale[c] = 1 / sqrtf(scale[c]);
    for (int i = 0; i < n; i++) {
        EACH(c) {
            vec y = (LD(AT(in, i) + c) - LD(mean + c)) * LD(scale + c);
            ST(AT(out, i) + c, y * op->weight[i] + op->bias[i]);
        }
    }
}

static TARGET void NAME(softmax)(const Op *op, const REAL *in, REAL *out) {
    for (int first = 0; first < op->n_in; first += op->n_out) {
        const int end = first + op->n_out;
        EACH(c) {
            vec largest = LD(AT(in, first) + c), sum = ZERO;
            for (int i = first + 1; i < end; i++) largest = VMAX(largest, LD(AT(in, i) + c));
            for (int i = first; i < end; i++) {
                vec e = NAME(exp)(LD(AT(in, i) + c) - largest);
                ST(AT(out, i) + c, e);
                sum += e;
            }
            for (int i = first; i < end; i++) ST(AT(out, i) + c, LD(AT(out, i) + c) / sum);
        }
    }
}

/* A third feature follows, for backward: the logits' logsumexp. */
static TARGET void NAME(log_prob_and_entropy)(const Op *op, const REAL *in, const REAL *action, REAL *out) {
    EACH(c) {
        vec largest = LD(in + c), sum = ZERO, at_action = ZERO, weighted = ZERO;
        for (int i = 1; i < op->n_in; i++) largest = VMAX(largest, LD(AT(in, i) + c));
        for (int i = 0; i < op->n_in; i++) {
            vec shifted = LD(AT(in, i) + c) - largest, e = NAME(exp)(shifted);
            sum += e, weighted += e * shifted;
            at_action += WHERE(LD(action + c) == (REAL)i, shifted);
        }
        REAL *log_sum = AT(out, 2) + c;
        ST(log_sum, sum);
        for (int lane = 0; lane < VLEN; lane++) log_sum[lane] = logf(log_sum[lane]);
        ST(out + c, at_action - LD(log_sum));
        ST(AT(out, 1) + c, LD(log_sum) - weighted / sum);
        ST(log_sum, LD(log_sum) + largest);
    }
}

/* Taylor series around the nearest multiple of 90 degrees; the first omitted term is below 3e-8. The angle is reduced
 * in double precision, accurate up to 1e8; for larger ones the library is called. */
static TARGET void NAME(sines)(const Op *op, const REAL *in, REAL *out) {
    const double right = 1.5707963267948966, per_right = 1 / right;
    const double whole = 6755399441055744.0; /* 1.5 * 2^52: adding and subtracting it rounds */
    REAL angles[TILE];
    for (int i = 0; i < op->n_out; i++) {
        REAL *sine = AT(out, i), *cosine = AT(out, op->n_out + i);
        int large = 0;
        for (int c = 0; c < TILE; c++) {
            const REAL angle = angles[c] = 6.283185307179586f * in[c] / op->weight[i]; /* rounded as torch does */
            large |= !(fabsf(angle) < 1e8f);
            const double quarters = angle * per_right + whole - whole;
            const REAL x = (REAL)(angle - quarters * right);
            const REAL q = (REAL)(quarters - 4 * (0.25 * quarters + whole - whole));
            const REAL z = x * x; /* q: -2, -1, 0, 1 or 2 quarters */
            const REAL s = x * (1 + z * (-1 / 6.f + z * (1 / 120.f + z * (-1 / 5040.f + z * (1 / 362880.f)))));
            const REAL k = 1 + z * (-1 / 2.f + z * (1 / 24.f + z * (-1 / 720.f + z * (1 / 40320.f))));
            sine[c] = q == 0 ? s : q == 1 ? k : q == -1 ? -k : -s;
            cosine[c] = q == 0 ? k : q == 1 ? -s : q == -1 ? s : -k;
        }
        for (int c = 0; large && c < TILE; c++) sine[c] = sinf(angles[c]), cosine[c] = cosf(angles[c]);
    }
}

/* Sample actions as argmax(log p - log exp_noise), exp_noise from Exp(1), as UncheckedCategorical.sample does. */
static TARGET void NAME(sample_categorical)(const Op *op, const REAL *logits, const REAL *exp_noise, int64_t *actions,
                                            REAL *log_probs, int n) {
    for (int c = 0; c < n; c++) {
        REAL largest = logits[c], sum = 0, best_score = 0, log_prob = 0;
        int64_t action = -1;
        for (int i = 1; i < op->n_in; i++) largest = AT(logits, i)[c] > largest ? AT(logits, i)[c] : largest;
        for (int i = 0; i < op->n_in; i++) sum += expf(AT(logits, i)[c] - largest);
        const REAL log_sum = largest + logf(sum);
        for (int i = 0; i < op->n_in; i++) {
            REAL log_p = AT(logits, i)[c] - log_sum, score = log_p - logf(AT(exp_noise, i)[c]);
            if (action < 0 || score > best_score) action = i, best_score = score, log_prob = log_p;
        }
        actions[c] = action;
        log_probs[c] = log_prob;
    }
}

/* One step of a layer's recurrence, on [n, H, D]. Return 1 without memory. */
static TARGET int NAME(heads)(const Program *program, const Op *op, REAL *features, REAL *scratch, int64_t first,
                              int n) {
    const int H = op->n_out, D = op->n_in / H;
    const int64_t size = (int64_t)op->n_in * (3 * D + 4), S = program->state_size;
    const int per_job = S == size ? n : 1; /* environments whose shifts follow one another */
    REAL *x = scratch, *y = AT(x, op->n_in), *retention = AT(y, op->n_in);
    NAME(store_transposed)(AT(features, op->from), n, op->n_in, x);
    if (op->add >= 0) NAME(store_transposed)(AT(features, op->add), n, H, retention);
    for (int i = 0; i < n; i += per_job) {
        const int64_t at = (op->index * program->B + first + i) * S;
        Job job = {.T = 1, .B = per_job, .H = H, .D = D, .E = D, .grain = (int64_t)per_job * H};
        job.bound = op->number;
        job.x = x + i * op->n_in, job.weight = op->weight, job.shift = program->state + at;
        job.starts = program->starts + first + i;
        job.y = y + i * op->n_in, job.final = program->final + at;
        job.retention = op->add >= 0 ? retention + i * H : 0;
        scan_worker(0, program->level, D)(&job);
        if (job.failed) return 1;
        if (op->index) memset(program->final + at + size, 0, (S - size) * sizeof(REAL));
    }
    NAME(load_transposed)(y, n, op->n_in, AT(features, op->to));
    return 0;
}

/* One step of the short convolution. */
static TARGET void NAME(short_conv)(const Program *program, const Op *op, const REAL *in, REAL *out, REAL *scratch,
                                    int64_t first, int n) {
    REAL *x = scratch, *y = AT(x, op->n_in);
    NAME(store_transposed)(in, n, op->n_in, x);
    for (int i = 0; i < n; i++) {
        const int64_t at = (first + i) * program->state_size + op->index;
        Conv conv = {.T = 1, .B = 1, .C = op->n_in, .W = op->n_out};
        conv.x = x + i * op->n_in, conv.weight = op->weight, conv.state = program->state + at;
        conv.starts = program->starts + first + i;
        conv.y = y + i * op->n_in, conv.final = program->final + at;
        NAME(short_conv_forward)(&conv);
    }
    NAME(load_transposed)(y, n, op->n_in, out);
}

/* Run all operations for the rows [first, first + n). Return 1 without memory. */
static TARGET int NAME(tile_forward)(const Program *program, REAL *features, REAL *scratch, int64_t first, int n) {
    for (const Op *op = program->ops; op < program->ops + program->n_ops; op++) {
        REAL *from = AT(features, op->from), *to = AT(features, op->to);
        const REAL *add = op->add >= 0 ? AT(features, op->add) : 0;
        switch (op->kind) {
            case INPUT: NAME(load_transposed)(program->inputs[op->index] + first * op->n_out, n, op->n_out, to); break;
            case OUTPUT:
                if (program->outputs)
                    NAME(store_transposed)(from, n, op->n_in, program->outputs[op->index] + first * op->n_in);
                break;
            case LINEAR: NAME(linear)(op, from, add, to); break;
            case NORM: NAME(norm)(op, from, to); break;
            case SOFTMAX: NAME(softmax)(op, from, to); break;
            case LOG_PROB_AND_ENTROPY: NAME(log_prob_and_entropy)(op, from, add, to); break;
            case PPO_LOSS: break;
            case SINES: NAME(sines)(op, from, to); break;
            case HEADS:
                if (NAME(heads)(program, op, features, scratch, first, n)) return 1;
                break;
            case SAMPLE:
                NAME(sample_categorical)(op, from, add, program->actions + first, program->outputs[op->index] + first, n);
                break;
            case SHORT_CONV: NAME(short_conv)(program, op, from, to, scratch, first, n); break;
        }
    }
    return 0;
}

/* ---- backward ---- */

/* sums [n][LANES] += each feature's sum over the tile, by lane */
INLINE void NAME(add_lanes)(const REAL *features, int n, REAL *sums) {
    for (int i = 0; i < n; i++) {
        vec sum = ZERO;
        EACH(c) sum += LD(AT(features, i) + c);
        ST(sums + (size_t)i * LANES, LD(sums + (size_t)i * LANES) + sum);
    }
}

/* grad, of the output, becomes that before the activation; sums: weight [n_out][PADDED(n_in)], bias [n_out][LANES] */
static TARGET void NAME(linear_backward)(const Op *op, const REAL *in, const REAL *out, REAL *grad, REAL *grad_in,
                                     REAL *grad_add, REAL *transposed, REAL *sums) {
    const size_t padded = PADDED(op->n_in);
    for (int i = 0; i < op->n_out; i++) {
        EACH(c) {
            vec g = LD(AT(grad, i) + c), y = LD(AT(out, i) + c);
            if (op->activation == SIGMOID) g *= y * (1 - y);
            if (op->activation == TANH) g *= 1 - y * y;
            if (op->activation == RELU) g = WHERE(y > 0, g);
            ST(AT(grad, i) + c, g);
            if (grad_add) ST(AT(grad_add, i) + c, LD(AT(grad_add, i) + c) + g);
        }
    }
    if (op->bias) NAME(add_lanes)(grad, op->n_out, sums + op->n_out * padded);
    NAME(transpose)(in, TILE, op->n_in, TILE, transposed, padded);
    NAME(product)(op->n_out, TILE, (int)padded, grad, TILE, 1, transposed, padded, sums, padded);
    if (grad_in) NAME(product)(op->n_in, op->n_out, TILE, op->weight, 1, op->n_in, grad, TILE, grad_in, TILE);
}

/* sums: weight, bias, [n][LANES] each */
static TARGET void NAME(norm_backward)(const Op *op, const REAL *in, const REAL *out, const REAL *grad, REAL *grad_in,
                                   REAL *sums) {
    const int n = op->n_in;
    const REAL *mean = AT(out, n), *scale = AT(out, n + 1);
    NAME(add_lanes)(grad, n, sums + (size_t)n * LANES);
    EACH(c) {
        const vec m = LD(mean + c), s = LD(scale + c);
        vec sum = ZERO, weighted = ZERO;
        for (int i = 0; i < n; i++) {
            vec g = LD(AT(grad, i) + c), y = (LD(AT(in, i) + c) - m) * s;
            REAL *lanes = sums + (size_t)i * LANES;
            ST(lanes, LD(lanes) + g * y);
            g *= op->weight[i];
            sum += g, weighted += g * y;
        }
        sum /= (REAL)n, weighted /= (REAL)n;
        for (int i = 0; i < n; i++) {
            vec y = (LD(AT(in, i) + c) - m) * s, g = LD(AT(grad, i) + c) * op->weight[i];
            ST(AT(grad_in, i) + c, LD(AT(grad_in, i) + c) + (g - sum - y * weighted) * s);
        }
    }
}

static TARGET void NAME(grouped_softmax_backward)(const Op *op, const REAL *out, const REAL *grad, REAL *grad_in) {
    for (int first = 0; first < op->n_in; first += op->n_out) {
        EACH(c) {
            vec weighted = ZERO;
            for (int i = first; i < first + op->n_out; i++) weighted += LD(AT(grad, i) + c) * LD(AT(out, i) + c);
            for (int i = first; i < first + op->n_out; i++) {
                vec g = (LD(AT(grad, i) + c) - weighted) * LD(AT(out, i) + c);
                ST(AT(grad_in, i) + c, LD(AT(grad_in, i) + c) + g);
            }
        }
    }
}

static TARGET void NAME(log_prob_and_entropy_backward)(const Op *op, const REAL *in, const REAL *action,
                                                       const REAL *out, const REAL *grad, REAL *grad_in) {
    EACH(c) {
        const vec g = LD(grad + c), g_entropy = LD(AT(grad, 1) + c), entropy = LD(AT(out, 1) + c);
        for (int i = 0; i < op->n_in; i++) {
            vec log_p = LD(AT(in, i) + c) - LD(AT(out, 2) + c), p = NAME(exp)(log_p);
            vec sum = LD(AT(grad_in, i) + c) - p * (g + g_entropy * (log_p + entropy));
            ST(AT(grad_in, i) + c, sum + WHERE(LD(action + c) == (REAL)i, g));
        }
    }
}

/* NaN stays NaN. */
INLINE vec NAME(clamp)(vec x, REAL low, REAL high) {
    return SELECT(x < low, ZERO + low, SELECT(x > high, ZERO + high, x));
}

/* action_stats: log-probability and entropy; old: log-probability, advantage, return and value; terms: [TERMS][TILE],
 * added to sums. NaN in any of them reaches the terms and gradients. */
static TARGET void NAME(ppo_loss)(const PPOLossParams *params, const REAL *action_stats, const REAL *value,
                                  const REAL *old, REAL *grad_stats, REAL *grad_value, REAL *terms, REAL *sums,
                                  int n) {
    EACH(c) {
        const REAL clip_range = params->clip_range;
        const vec advantage = LD(AT(old, 1) + c);
        const vec log_ratio = LD(action_stats + c) - LD(old + c);
        /* NAME(exp) overflows above 88 */
        const vec ratio = SELECT(log_ratio > 88, ZERO + INFINITY, NAME(exp)(NAME(clamp)(log_ratio, -INFINITY, 88)));
        const vec surrogate = advantage * ratio, ratio_minus_1 = ratio - 1;
        const vec clipped = advantage * NAME(clamp)(ratio, 1 - clip_range, 1 + clip_range);
        ST(terms + c, -SELECT(clipped < surrogate, clipped, surrogate));
        ST(grad_stats + c, LD(grad_stats + c) - SELECT(clipped < surrogate, 0 * surrogate, surrogate) * params->scale);
        ST(AT(grad_stats, 1) + c, LD(AT(grad_stats, 1) + c) - params->ent_coef * params->scale);
        vec new_value = LD(value + c), scale = ZERO + 2 * params->vf_coef * params->scale;
        if (params->clip_range_vf >= 0) {
            const REAL range = params->clip_range_vf;
            const vec old_value = LD(AT(old, 3) + c), change = new_value - old_value;
            new_value = old_value + NAME(clamp)(change, -range, range);
            scale = SELECT((change > range) | (change < -range), ZERO, scale);
        }
        const vec error = new_value - LD(AT(old, 2) + c);
        ST(grad_value + c, LD(grad_value + c) + scale * error);
        ST(AT(terms, 1) + c, error * error);
        ST(AT(terms, 2) + c, LD(AT(action_stats, 1) + c));
        ST(AT(terms, 3) + c, ratio_minus_1 - log_ratio);
        ST(AT(terms, 4) + c, WHERE((ratio_minus_1 > clip_range) | (ratio_minus_1 < -clip_range), ZERO + 1));
    }
    for (int c = n; c < TILE; c++) { /* padding rows */
        for (int i = 0; i < TERMS; i++) AT(terms, i)[c] = 0;
        grad_stats[c] = AT(grad_stats, 1)[c] = grad_value[c] = 0;
    }
    NAME(add_lanes)(terms, TERMS, sums);
}

/* Backward through all operations for the rows [first, first + n), after tile_forward. */
static TARGET void NAME(tile_backward)(const Program *program, const REAL *features, REAL *grads, REAL *scratch, REAL *sums,
                                        int64_t first, int n) {
    memset(grads, 0, (size_t)program->n_features * TILE * sizeof(REAL));
    for (const Op *op = program->ops + program->n_ops - 1; op >= program->ops; op--) {
        const REAL *in = AT(features, op->from), *out = AT(features, op->to);
        REAL *grad = AT(grads, op->to), *grad_in = AT(grads, op->from);
        switch (op->kind) {
            case INPUT:
                if (program->grad_inputs[op->index])
                    NAME(store_transposed)(grad, n, op->n_out, program->grad_inputs[op->index] + first * op->n_out);
                break;
            case OUTPUT:
                if (!program->grad_outputs[op->index]) break;
                NAME(load_transposed)(program->grad_outputs[op->index] + first * op->n_in, n, op->n_in, scratch);
                for (int c = 0; c < op->n_in * TILE; c += VLEN) ST(grad_in + c, LD(grad_in + c) + LD(scratch + c));
                break;
            case LINEAR:
                NAME(linear_backward)(op, in, out, grad, op->is_leaf ? 0 : grad_in, op->add >= 0 ? AT(grads, op->add) : 0,
                                  scratch, sums + op->sums);
                break;
            case NORM: NAME(norm_backward)(op, in, out, grad, grad_in, sums + op->sums); break;
            case SOFTMAX: NAME(grouped_softmax_backward)(op, out, grad, grad_in); break;
            case LOG_PROB_AND_ENTROPY:
                NAME(log_prob_and_entropy_backward)(op, in, AT(features, op->add), out, grad, grad_in);
                break;
            case PPO_LOSS:
                NAME(ppo_loss)(program->loss_params, in, AT(features, op->add), out, grad_in, AT(grads, op->add), scratch,
                                sums + op->sums, n);
                break;
        }
    }
}

/* ---- a thread's work ---- */

/* Run shares of the tiles, in backward each with sums of its own, until none is left. */
static TARGET void NAME(program_worker)(void *data) {
    Program *program = (Program *)data;
    const size_t tile = (size_t)program->n_features * TILE, scratch_size = (size_t)program->n_scratch * TILE;
    void *block = malloc((tile * (program->sums ? 2 : 1) + scratch_size) * sizeof(REAL) + 64);
    if (!block) {
        program->failed = 1;
        return;
    }
    REAL *features = (REAL *)ALIGN(block), *scratch = features + tile, *grads = scratch + scratch_size;
    if (program->sums) memset(scratch, 0, scratch_size * sizeof(REAL)); /* the padding of transposed matrices */
    const int64_t tiles = (program->B + TILE - 1) / TILE, per_share = (tiles + program->n_shares - 1) / program->n_shares;
    for (int64_t share; (share = TAKE(program)) < program->n_shares;) {
        for (int64_t t = share * per_share; t < (share + 1) * per_share && t < tiles; t++) {
            const int64_t first = t * TILE, left = program->B - first;
            const int n = left < TILE ? (int)left : TILE;
            if (NAME(tile_forward)(program, features, scratch, first, n)) program->failed = 1;
            if (program->sums)
                NAME(tile_backward)(program, features, grads, scratch, program->sums + share * program->n_sums, first, n);
        }
    }
    free(block);
}
