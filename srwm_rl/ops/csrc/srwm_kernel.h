/* The SRWM recurrence, forward and backward. ../README.md derives the algorithm; names follow it.
 *
 * Layout: a head's W is [DR][P]. A row has C = E+2D+4 columns (y: E, q: D, k: D, beta: 4) and zeros up to P, a multiple
 * of VLEN; there are DR rows, D and zeros up to a multiple of 4. As rows are contiguous, `a W` needs no sum across lanes.
 */

/* ---- a thread's memory ---- */

typedef struct {
    REAL *W;             /* forward: one matrix; backward: one for each step of a chunk */
    REAL *G;             /* backward: the gradient of W */
    REAL *steps;         /* a record for each step of a chunk: k, q, u [DQ each], rates by column, e [P each] */
    REAL *r, *z;         /* x W of this step and x' W of the next */
    REAL *x;             /* the next step's input, padded */
    REAL *q_pad, *k_pad; /* logits, padded with -inf */
    REAL *ge, *gd, *gr;  /* backward: gradients of e, d and r */
    REAL *gk, *gu, *gx;  /* backward: gradients of k, u and x */
    REAL *products;      /* ge * e */
    REAL *edits;         /* forward: four rows of the sum of a chunk's edits */
    REAL *slow, *S, *A;  /* constrained_kernel.h: slow weight; shift (backward: one per step and the last); gradient of slow */
    REAL *scales;        /* constrained_kernel.h: the factor by which the bound scaled each step's shift; 0: not scaled */
    void *block;
} NAME(work);

#define DR_OF(D) ROUND(D, 4)
#define DQ_OF(D) ROUND(D, VLEN > 4 ? VLEN : 4)
#define C_OF(D, E) ((E) + 2 * (D) + 4)
#define P_OF(D, E) ROUND(C_OF(D, E), VLEN)
#define STEP_SIZE(D, E) ((size_t)ROUND(3 * DQ_OF(D) + 2 * P_OF(D, E), 16))

static TARGET int NAME(work_new)(NAME(work) *work, int D, int E, int backward, int constrained) {
    /* 32 numbers of slack each: a whole vector may be read or written from the last number on. */
    const size_t dq = DQ_OF(D) + 32, p = P_OF(D, E) + 32, matrix = ROUND((size_t)DR_OF(D) * P_OF(D, E), 16);
    const NAME(part) parts[] = {{&work->W, backward && !constrained ? CHUNK * matrix : matrix},
                                {&work->G, backward ? matrix : 0},
                                {&work->steps, STEP_SIZE(D, E) * CHUNK + 32},
                                {&work->r, p},
                                {&work->z, p},
                                {&work->x, dq},
                                {&work->q_pad, dq},
                                {&work->k_pad, dq},
                                {&work->ge, p},
                                {&work->gd, p},
                                {&work->gr, p},
                                {&work->gk, dq},
                                {&work->gu, dq},
                                {&work->gx, dq},
                                {&work->products, p},
                                {&work->edits, 4 * p},
                                {&work->slow, constrained ? matrix : 0},
                                {&work->S, !constrained ? 0 : backward ? (CHUNK + 1) * matrix : matrix},
                                {&work->A, constrained && backward ? matrix : 0},
                                {&work->scales, constrained ? CHUNK : 0}};
    work->block = NAME(allocate)(parts, sizeof(parts) / sizeof(parts[0]));
    if (!work->block) return 0;
    for (int i = D; i < DQ_OF(D); i++) work->q_pad[i] = work->k_pad[i] = -(REAL)INFINITY;
    return 1;
}

/* ---- forward ---- */

/* to[from .. end) = value */
INLINE void NAME(fill)(REAL *to, int from, int end, REAL value) {
    if (from % VLEN == 0 && end % VLEN == 0) {
        for (int c = from; c < end; c += VLEN) ST(to + c, ZERO + value);
    } else {
        for (int c = from; c < end; c++) to[c] = value;
    }
}

/* Write the record's k, q, u = q - k and rates by column from r = x W. */
INLINE void NAME(gates)(int D, int E, const NAME(work) *work, REAL *step) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const REAL *r = work->r, *logits = r + E, *beta = logits + 2 * D;
    REAL *k = step, *q = k + DQ, *u = q + DQ, *rates = u + DQ;
    if (D != DQ) {
        memcpy(work->q_pad, logits, D * sizeof(REAL));
        memcpy(work->k_pad, logits + D, D * sizeof(REAL));
    }
    const REAL *q_in = D == DQ ? logits : work->q_pad, *k_in = D == DQ ? logits + D : work->k_pad;
    vec q_vec = LDU(q_in), k_vec = LDU(k_in);
    for (int c = VLEN; c < DQ; c += VLEN) q_vec = VMAX(q_vec, LDU(q_in + c)), k_vec = VMAX(k_vec, LDU(k_in + c));
    REAL q_max, k_max, q_sum, k_sum;
    NAME(max2)(q_vec, k_vec, &q_max, &k_max);
    q_vec = k_vec = ZERO;
    for (int c = 0; c < DQ; c += VLEN) {
        vec qe = NAME(exp)(LDU(q_in + c) - q_max), ke = NAME(exp)(LDU(k_in + c) - k_max);
        ST(q + c, qe), ST(k + c, ke);
        q_vec += qe, k_vec += ke;
    }
    NAME(sum2)(q_vec, k_vec, &q_sum, &k_sum);
    REAL q_scale = 1 / q_sum, k_scale = 1 / k_sum;
    for (int c = 0; c < DQ; c += VLEN) {
        vec qv = LD(q + c) * q_scale, kv = LD(k + c) * k_scale;
        ST(q + c, qv), ST(k + c, kv), ST(u + c, qv - kv);
    }
#if VLEN == 1
    REAL rate[4];
    for (int g = 0; g < 4; g++) rate[g] = NAME(sigmoid)(beta[g]);
#else
    vec rate = NAME(sigmoid)(LDU(beta)); /* lanes from the fifth on are not used */
#endif
    NAME(fill)(rates, 0, E, rate[0]);
    NAME(fill)(rates, E, E + D, rate[1]);
    NAME(fill)(rates, E + D, E + 2 * D, rate[2]);
    NAME(fill)(rates, E + 2 * D, P, rate[3]);
}

/* Run steps [begin, end) of one chunk, without resets, from the matrix work->W on; y: NULL in backward.
 *
 * Step i's matrix is work->W + i * slot (slot 0: in place), its record work->steps + i * STEP_SIZE. The next step's x' W
 * is computed from W before the step's edit and corrected by (x' . k) e, so that the edit of W and the softmax overlap.
 * The last step's edit is recorded, not applied.
 */
INLINE void NAME(span)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair, int64_t begin, int64_t end,
                       size_t slot, REAL *y) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const int64_t pairs = job->B * job->H;
    const REAL *x = (const REAL *)job->x + (begin * pairs + pair) * D, *next = x;
    REAL *W = work->W, *step = work->steps;
    NAME(read)(D, P, W, x, 0, work->r);
    for (int64_t t = begin; t < end; t++, x = next, step += STEP_SIZE(D, E)) {
        REAL *k = step, *u = k + 2 * DQ, *rates = u + DQ, *e = rates + P;
        if (y) memcpy(y + (t * pairs + pair) * E, work->r, E * sizeof(REAL));
        NAME(gates)(D, E, work, step);
        if (t + 1 < end) next = x + pairs * D;
        if (t > begin) {
            const REAL *last = step - STEP_SIZE(D, E);
            NAME(edit_read)(D, P, W, W + slot, last, last + 3 * DQ + P, next, work->z);
            W += slot;
        } else if (t + 1 < end) {
            NAME(read)(D, P, W, next, 0, work->z);
        }
        NAME(read)(D, P, W, u, rates, e);
        if (t + 1 < end) {
            memcpy(work->x, next, D * sizeof(REAL));
            const REAL correction = NAME(dot)(DQ, work->x, k);
            for (int c = 0; c < P; c += VLEN) ST(work->r + c, LD(work->z + c) + LD(e + c) * correction);
        }
    }
}

/* to [D, C] = from (NULL: zeros) + the recorded edits of `count` steps */
INLINE void NAME(add_edits)(int D, int E, const NAME(work) *work, int count, const REAL *from, REAL *to) {
    const int C = C_OF(D, E), P = P_OF(D, E);
    if (count == 1 && from) { /* acting */
        const REAL *k = work->steps, *e = k + 3 * DQ_OF(D) + P;
        for (int i = 0; i < D; i++, from += C, to += C) {
            int c = 0;
            for (; c + VLEN <= C; c += VLEN) STU(to + c, LDU(from + c) + LD(e + c) * k[i]);
            for (; c < C; c++) to[c] = from[c] + e[c] * k[i];
        }
        return;
    }
    for (int i = 0; i < D; i += 4) {
#define CALL(nb) \
    NAME(edits_block)(P, nb, work->steps, STEP_SIZE(D, E), count, i, 3 * DQ_OF(D) + P + c, work->edits + c)
        BLOCKS(EDIT_BLOCK, P, CALL);
#undef CALL
        for (int r = 0; r < 4 && i + r < D; r++) {
            const REAL *edits = work->edits + r * P;
            size_t row = (size_t)(i + r) * C;
            int c = 0;
            if (from) {
                for (; c + VLEN <= C; c += VLEN) STU(to + row + c, LDU(from + row + c) + LD(edits + c));
                for (; c < C; c++) to[row + c] = from[row + c] + edits[c];
            } else {
                memcpy(to + row, edits, C * sizeof(REAL));
            }
        }
    }
}

/* W [DR][P] = slow + shift (NULL: zeros), both [D, C] */
INLINE void NAME(pad)(int D, int E, REAL *W, const REAL *slow, const REAL *shift) {
    const int C = C_OF(D, E), P = P_OF(D, E);
    for (int i = 0; i < D; i++) {
        REAL *row = W + (size_t)i * P;
        const REAL *a = slow + (size_t)i * C;
        if (!shift) {
            memcpy(row, a, C * sizeof(REAL));
            continue;
        }
        const REAL *b = shift + (size_t)i * C;
        int c = 0;
        for (; c + VLEN <= C; c += VLEN) ST(row + c, LDU(a + c) + LDU(b + c));
        for (; c < C; c++) row[c] = a[c] + b[c];
    }
}

/* Where step `t` begins a chunk, the checkpoint of its carried state; `size` numbers per pair */
INLINE REAL *NAME(checkpoint_at)(const Job *job, int64_t size, int64_t pair, int64_t t) {
    return (REAL *)job->checkpoints + ((t / CHUNK - 1) * job->B * job->H + pair) * size;
}

/* The state that step `t`, a span's first, starts from; NULL: zeros */
INLINE const REAL *NAME(state_at)(const Job *job, int64_t size, int64_t pair, int64_t t) {
    if (starts_at(job, t, pair / job->H)) return 0;
    if (t) return NAME(checkpoint_at)(job, size, pair, t);
    return job->shift ? (const REAL *)job->shift + pair * size : 0;
}

INLINE void NAME(forward_pair)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair) {
    const int64_t batch = pair / job->H, size = (int64_t)D * C_OF(D, E);
    const REAL *slow = (const REAL *)job->weight + pair % job->H * size;
    const REAL *shift = job->shift ? (const REAL *)job->shift + pair * size : 0;
    REAL *final = (REAL *)job->final + pair * size;

    /* `final` accumulates the shift, apart from W: edits too small to change W in this precision still count. */
    for (int64_t begin = 0, end; begin < job->T; begin = end) {
        end = span_end(job, begin, batch);
        if (begin && begin % CHUNK == 0 && job->checkpoints)
            memcpy(NAME(checkpoint_at)(job, size, pair, begin), final, size * sizeof(REAL));
        const REAL *from = starts_at(job, begin, batch) ? 0 : begin ? final : shift;
        NAME(pad)(D, E, work->W, slow, from);
        NAME(span)(D, E, job, work, pair, begin, end, 0, (REAL *)job->y);
        NAME(add_edits)(D, E, work, (int)(end - begin), from, final);
    }
}

/* ---- backward ---- */

/* The gradients of the logits of q and k = softmax(.): p * (g - p . g); k's gradient is gk - gq, as u = q - k. */
INLINE void NAME(softmax_backward)(int DQ, const REAL *q, const REAL *gq, REAL *q_out, const REAL *k, const REAL *gk,
                                   REAL *k_out) {
    vec q_sum = ZERO, k_sum = ZERO;
    for (int c = 0; c < DQ; c += VLEN) q_sum += LD(q + c) * LD(gq + c), k_sum += LD(k + c) * (LD(gk + c) - LD(gq + c));
    REAL q_dot, k_dot;
    NAME(sum2)(q_sum, k_sum, &q_dot, &k_dot);
    for (int c = 0; c < DQ; c += VLEN) STU(q_out + c, LD(q + c) * (LD(gq + c) - q_dot));
    for (int c = 0; c < DQ; c += VLEN) STU(k_out + c, LD(k + c) * (LD(gk + c) - LD(gq + c) - k_dot));
}

/* The sum of n numbers, unaligned */
INLINE REAL NAME(sum_of)(int n, const REAL *a) {
    vec s = ZERO;
    int c = 0;
    for (; c + VLEN <= n; c += VLEN) s += LDU(a + c);
    REAL rest = 0;
    for (; c < n; c++) rest += a[c];
    return rest + NAME(sum)(s);
}

/* work->gr = the gradient of r = x W, columns y | q | k | beta */
INLINE void NAME(gates_backward)(int D, int E, const NAME(work) *work, const REAL *step, const REAL *grad_y) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const REAL *k = step, *q = k + DQ, *rates = q + 2 * DQ, *e = rates + P;
    REAL *gr = work->gr, *products = work->products, sums[4];
    /* In this order: each whole-vector write puts zeros over the beginning of the next group. */
    if (grad_y) memcpy(gr, grad_y, E * sizeof(REAL));
    NAME(softmax_backward)(DQ, q, work->gu, gr + E, k, work->gk, gr + E + D);
    for (int c = 0; c < P; c += VLEN) ST(products + c, LD(work->ge + c) * LD(e + c));
    sums[0] = NAME(sum_of)(E, products);
    for (int g = 1; g < 3; g++) sums[g] = NAME(sum_of)(D, products + E + (g - 1) * D);
    const REAL *last = products + E + 2 * D;
    sums[3] = last[0] + last[1] + last[2] + last[3];
    for (int g = 0; g < 4; g++) gr[E + 2 * D + g] = sums[g] * (1 - rates[g ? E + (g - 1) * D : 0]);
}

/* G += u (outer) gd + x (outer) gr; gx = W gr. Then for the step `earlier`, unless NULL: gk = G e, ge = k G. */
INLINE void NAME(edit_backward)(int D, int E, const NAME(work) *work, const REAL *W, const REAL *u,
                                const REAL *earlier) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const REAL *k = earlier, *e = earlier ? earlier + 3 * DQ + P : 0, *gd = work->gd, *gr = work->gr, *x = work->x;
    REAL *ge = work->ge;
    for (int i = 0; i < DR_OF(D); i += 4) {
        const REAL *Wi = W + (size_t)i * P;
        REAL *Gi = work->G + (size_t)i * P;
        vec gx[4] = {ZERO, ZERO, ZERO, ZERO}, gk[4] = {ZERO, ZERO, ZERO, ZERO};
        for (int c = 0; c < P; c += VLEN) {
            vec gd_c = LD(gd + c), gr_c = LD(gr + c), e_c = ZERO, ge_c = ZERO;
            if (earlier) {
                e_c = LD(e + c);
                if (i) ge_c = LD(ge + c);
            }
            UNROLL for (int r = 0; r < 4; r++) {
                vec g = LD(Gi + r * P + c) + gd_c * u[i + r];
                g += gr_c * x[i + r];
                ST(Gi + r * P + c, g);
                gx[r] += gr_c * LD(Wi + r * P + c);
                if (earlier) {
                    gk[r] += g * e_c;
                    ge_c += g * k[i + r];
                }
            }
            if (earlier) ST(ge + c, ge_c);
        }
        NAME(sum4)(gx[0], gx[1], gx[2], gx[3], work->gx + i);
        if (earlier) NAME(sum4)(gk[0], gk[1], gk[2], gk[3], work->gk + i);
    }
}

/* The gradient of y at index `at` of [T, B, H]; NULL: zeros */
INLINE const REAL *NAME(grad_y_at)(int E, const Job *job, int64_t at) {
    return job->grad_y ? (const REAL *)job->grad_y + at * E : 0;
}

/* Backward through steps [begin, end) of one chunk, without resets; work->W is the first step's matrix. */
INLINE void NAME(span_backward)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair, int64_t begin,
                                int64_t end) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const size_t slot = ROUND((size_t)DR_OF(D) * P, 16);
    const int64_t pairs = job->B * job->H;
    NAME(span)(D, E, job, work, pair, begin, end, slot, 0);
    const REAL *last = work->steps + (end - 1 - begin) * STEP_SIZE(D, E);
    NAME(row_dots)(DR_OF(D), P, work->G, last + 3 * DQ + P, work->gk);
    NAME(read)(D, P, work->G, last, 0, work->ge);
    for (int64_t t = end - 1; t >= begin; t--) {
        const REAL *step = work->steps + (t - begin) * STEP_SIZE(D, E), *W = work->W + (t - begin) * slot;
        const REAL *rates = step + 3 * DQ;
        const int64_t at = (t * pairs + pair) * D;
        for (int c = 0; c < P; c += VLEN) ST(work->gd + c, LD(work->ge + c) * LD(rates + c));
        NAME(row_dots)(DR_OF(D), P, W, work->gd, work->gu);
        NAME(gates_backward)(D, E, work, step, NAME(grad_y_at)(E, job, t * pairs + pair));
        memcpy(work->x, (const REAL *)job->x + at, D * sizeof(REAL));
        if (t > begin)
            NAME(edit_backward)(D, E, work, W, step + 2 * DQ, step - STEP_SIZE(D, E));
        else
            NAME(edit_backward)(D, E, work, W, step + 2 * DQ, 0);
        memcpy((REAL *)job->grad_x + at, work->gx, D * sizeof(REAL));
    }
}

/* grad_weight += G; G = 0 if the episode starts here; grad_shift = G */
INLINE void NAME(add_slow_gradient)(int D, int E, REAL *G, REAL *grad_weight, REAL *grad_shift, int starts) {
    const int C = C_OF(D, E), P = P_OF(D, E);
    for (int i = 0; i < D; i++, G += P) {
        for (int c = 0; c < C; c++) grad_weight[i * C + c] += G[c];
        if (starts) memset(G, 0, P * sizeof(REAL));
        if (grad_shift) memcpy(grad_shift + i * C, G, C * sizeof(REAL));
    }
}

INLINE void NAME(backward_pair)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair) {
    const int C = C_OF(D, E), P = P_OF(D, E);
    const int64_t size = (int64_t)D * C;
    const REAL *slow = (const REAL *)job->weight + pair % job->H * size;
    const REAL *grad_final = job->grad_final ? (const REAL *)job->grad_final + pair * size : 0;
    REAL *grad_weight = (REAL *)job->grad_weight + pair * size;
    REAL *grad_shift = job->grad_shift ? (REAL *)job->grad_shift + pair * size : 0;

    memset(work->G, 0, (size_t)DR_OF(D) * P * sizeof(REAL));
    memset(grad_weight, 0, size * sizeof(REAL));
    if (grad_final) { /* final shift = W - slow */
        NAME(pad)(D, E, work->G, grad_final, 0);
        for (int64_t i = 0; i < size; i++) grad_weight[i] = -grad_final[i];
    }
    for (int64_t end = job->T, begin; end > 0; end = begin) {
        begin = span_begin(job, end, pair / job->H);
        const int starts = starts_at(job, begin, pair / job->H);
        NAME(pad)(D, E, work->W, slow, NAME(state_at)(job, size, pair, begin));
        NAME(span_backward)(D, E, job, work, pair, begin, end);
        if (starts || !begin) NAME(add_slow_gradient)(D, E, work->G, grad_weight, begin ? 0 : grad_shift, starts);
    }
}
