/* The delta rule for one number type and one vector width; srwm_kernel.h includes this and lends it its tools.
 *
 * Equations, names and checkpoints: ../README.md. A head's W is [DR][PD]: rows by key, columns by value, both padded
 * with zeros. A thread's memory is laid out for the larger matrices of srwm_kernel.h, so all fits; of its parts, `x`
 * holds the value, `gr` the gradient of y, `gd` that of the value, `gx` that of the query, and a step's record is
 * k, q [DQ each], then d = v - k W and e = rate * d [PD each].
 */

#define PD_OF(D) ROUND(D, VLEN)
#define DELTA_STEP(D) ((size_t)ROUND(2 * DQ_OF(D) + 2 * PD_OF(D), 16))

/* to = from + k (outer) e; then out_a = a to and, unless b is NULL, out_b = b to; nb column vectors at once, 1 or 2 */
INLINE void NAME(delta_write_block)(int D, int P, int nb, const REAL *from, REAL *to, const REAL *k, const REAL *e,
                                    const REAL *a, const REAL *b, REAL *out_a, REAL *out_b) {
    vec sum_a[2][2], sum_b[2][2], edit[2]; /* rows in turns: two chains for each sum */
    for (int v = 0; v < nb; v++) {
        sum_a[0][v] = sum_a[1][v] = sum_b[0][v] = sum_b[1][v] = ZERO;
        edit[v] = LD(e + v * VLEN);
    }
    for (int i = 0; i < D; i += 2) {
        for (int n = 0; n < 2 && i + n < D; n++) {
            for (int v = 0; v < nb; v++) {
                size_t at = (size_t)(i + n) * P + v * VLEN;
                vec w = LD(from + at) + edit[v] * k[i + n];
                ST(to + at, w);
                sum_a[n][v] += w * a[i + n];
                if (b) sum_b[n][v] += w * b[i + n];
            }
        }
    }
    for (int v = 0; v < nb; v++) {
        ST(out_a + v * VLEN, sum_a[0][v] + sum_a[1][v]);
        if (b) ST(out_b + v * VLEN, sum_b[0][v] + sum_b[1][v]);
    }
}

INLINE void NAME(delta_write)(int D, int P, const REAL *from, REAL *to, const REAL *k, const REAL *e, const REAL *a,
                              const REAL *b, REAL *out_a, REAL *out_b) {
    int c = 0;
    for (; c + VLEN < P; c += 2 * VLEN)
        NAME(delta_write_block)(D, P, 2, from + c, to + c, k, e + c, a, b, out_a + c, b ? out_b + c : 0);
    if (c < P) NAME(delta_write_block)(D, P, 1, from + c, to + c, k, e + c, a, b, out_a + c, b ? out_b + c : 0);
}

/* r = k W */
INLINE void NAME(delta_read)(int D, const NAME(work) *work, const REAL *k) {
    const int P = PD_OF(D);
    for (int c = 0; c < P; c += VLEN) NAME(read_block)(D, P, 1, work->W + c, k, 0, work->r + c);
}

/* to [D, n_to columns] = from [D, n_from columns], without the padding */
INLINE void NAME(copy_rows)(int D, REAL *to, int n_to, const REAL *from, int n_from) {
    for (int i = 0; i < D; i++) memcpy(to + (size_t)i * n_to, from + (size_t)i * n_from, D * sizeof(REAL));
}

/* W = from (NULL: zeros), padded. The padding is zeroed too: what is not a number may have got into it. */
INLINE void NAME(delta_begin)(int D, REAL *W, const REAL *from) {
    memset(W, 0, (size_t)DR_OF(D) * PD_OF(D) * sizeof(REAL));
    if (from) NAME(copy_rows)(D, W, PD_OF(D), from, D);
}

/* d = v - r and e = rate * d; v as it lies in memory */
INLINE void NAME(delta_edit)(int D, const NAME(work) *work, const REAL *v, REAL rate, REAL *d, REAL *e) {
    memcpy(work->x, v, D * sizeof(REAL));
    for (int c = 0; c < PD_OF(D); c += VLEN) {
        vec difference = LD(work->x + c) - LD(work->r + c);
        ST(d + c, difference);
        ST(e + c, difference * rate);
    }
}

INLINE void NAME(delta_forward_pair)(int D, const Job *job, const NAME(work) *work, int64_t pair) {
    const int P = PD_OF(D);
    const int64_t batch = pair / job->H, pairs = job->B * job->H, size = (int64_t)D * D;
    const REAL *keys = (const REAL *)job->x, *values = (const REAL *)job->value, *queries = (const REAL *)job->query;
    REAL *W = work->W, *e = work->ge, *checkpoints = (REAL *)job->checkpoints;

    NAME(delta_begin)(D, W, job->shift ? (const REAL *)job->shift + pair * size : 0);
    NAME(delta_read)(D, work, keys + pair * D);
    for (int64_t t = 0; t < job->T; t++) {
        const int64_t at = (t * pairs + pair) * D, next = t + 1 < job->T ? at + pairs * D : at;
        if (t && t % CHUNK == 0 && checkpoints)
            NAME(copy_rows)(D, checkpoints + ((t / CHUNK - 1) * pairs + pair) * size, D, W, P);
        if (NAME(starts_at)(job, t, batch)) {
            NAME(delta_begin)(D, W, 0);
            memset(work->r, 0, P * sizeof(REAL));
        }
        NAME(delta_edit)(D, work, values + at, ((const REAL *)job->rate)[t * pairs + pair], work->gd, e);
        NAME(delta_write)(D, P, W, W, keys + at, e, queries + at, keys + next, work->z, work->r);
        memcpy((REAL *)job->y + at, work->z, D * sizeof(REAL));
    }
    NAME(copy_rows)(D, (REAL *)job->final + pair * size, D, W, P);
}

/* Run steps [begin, end) again, keeping each step's W (before its edit) and its record. */
INLINE void NAME(delta_span)(int D, const Job *job, const NAME(work) *work, int64_t pair, int64_t begin, int64_t end,
                             size_t slot) {
    const int DQ = DQ_OF(D), P = PD_OF(D);
    const int64_t pairs = job->B * job->H;
    const REAL *keys = (const REAL *)job->x;
    REAL *W = work->W, *step = work->steps;
    NAME(delta_read)(D, work, keys + (begin * pairs + pair) * D);
    for (int64_t t = begin; t < end; t++, W += slot, step += DELTA_STEP(D)) {
        const int64_t at = (t * pairs + pair) * D;
        REAL *q = step + DQ, *d = q + DQ, *e = d + P;
        memcpy(step, keys + at, D * sizeof(REAL));
        memcpy(q, (const REAL *)job->query + at, D * sizeof(REAL));
        NAME(delta_edit)(D, work, (const REAL *)job->value + at, ((const REAL *)job->rate)[t * pairs + pair], d, e);
        if (t + 1 < end) NAME(delta_write)(D, P, W, W + slot, step, e, keys + at + pairs * D, 0, work->r, 0);
    }
}

/* Four rows at a time: G += q (outer) gy - later_k (outer) gv, what the later step still owed; gk = G e; ge = k G. */
INLINE void NAME(delta_pull_back)(int D, const NAME(work) *work, const REAL *step, const REAL *later_k) {
    const int DQ = DQ_OF(D), P = PD_OF(D);
    const REAL *k = step, *q = k + DQ, *e = q + DQ + P, *gy = work->gr, *gv = work->gd;
    REAL *ge = work->ge;
    for (int i = 0; i < DR_OF(D); i += 4) {
        REAL *Gi = work->G + (size_t)i * P;
        vec gk[4] = {ZERO, ZERO, ZERO, ZERO};
        for (int c = 0; c < P; c += VLEN) {
            vec gy_c = LD(gy + c), gv_c = LD(gv + c), e_c = LD(e + c), ge_c = ZERO;
            if (i) ge_c = LD(ge + c);
            UNROLL for (int r = 0; r < 4; r++) {
                vec g = LD(Gi + r * P + c) + gy_c * q[i + r];
                if (later_k) g -= gv_c * later_k[i + r];
                ST(Gi + r * P + c, g);
                gk[r] += g * e_c;
                ge_c += g * k[i + r];
            }
            ST(ge + c, ge_c);
        }
        NAME(sum4)(gk[0], gk[1], gk[2], gk[3], work->gk + i);
    }
}

/* gq = W gy + k (e . gy), which is the edited W times gy; gk -= W gv */
INLINE void NAME(delta_gradients)(int D, const NAME(work) *work, const REAL *W, const REAL *step) {
    const int DQ = DQ_OF(D), P = PD_OF(D);
    const REAL *k = step, *e = k + 2 * DQ + P, *gy = work->gr, *gv = work->gd;
    const REAL again = NAME(dot)(P, e, gy);
    for (int i = 0; i < DR_OF(D); i += 4) {
        const REAL *row = W + (size_t)i * P;
        vec q[4] = {ZERO, ZERO, ZERO, ZERO}, v[4] = {ZERO, ZERO, ZERO, ZERO};
        for (int c = 0; c < P; c += VLEN) {
            vec gy_c = LD(gy + c), gv_c = LD(gv + c);
            UNROLL for (int r = 0; r < 4; r++) {
                vec w = LD(row + r * P + c);
                q[r] += gy_c * w;
                v[r] += gv_c * w;
            }
        }
        NAME(sum4)(q[0], q[1], q[2], q[3], work->gx + i);
        NAME(sum4)(v[0], v[1], v[2], v[3], work->gu + i);
        for (int r = i; r < i + 4; r++) work->gx[r] += k[r] * again, work->gk[r] -= work->gu[r];
    }
}

/* Go back from `end` to `begin`, a span without resets inside one chunk; work->W holds its first matrix. */
INLINE void NAME(delta_span_backward)(int D, const Job *job, const NAME(work) *work, int64_t pair, int64_t begin,
                                      int64_t end) {
    const int P = PD_OF(D);
    const size_t slot = ROUND((size_t)DR_OF(D) * P, 16);
    const int64_t pairs = job->B * job->H;
    NAME(delta_span)(D, job, work, pair, begin, end, slot);
    const REAL *later_k = 0;
    for (int64_t t = end - 1; t >= begin; t--) {
        const REAL *step = work->steps + (t - begin) * DELTA_STEP(D), *d = step + 2 * DQ_OF(D);
        const REAL rate = ((const REAL *)job->rate)[t * pairs + pair];
        const int64_t at = (t * pairs + pair) * D;
        if (job->grad_y) memcpy(work->gr, (const REAL *)job->grad_y + at, D * sizeof(REAL));
        if (later_k) NAME(delta_pull_back)(D, work, step, later_k);
        else NAME(delta_pull_back)(D, work, step, 0);
        ((REAL *)job->grad_rate)[t * pairs + pair] = NAME(dot)(P, work->ge, d);
        for (int c = 0; c < P; c += VLEN) ST(work->gd + c, LD(work->ge + c) * rate);
        NAME(delta_gradients)(D, work, work->W + (t - begin) * slot, step);
        memcpy((REAL *)job->grad_x + at, work->gk, D * sizeof(REAL));
        memcpy((REAL *)job->grad_value + at, work->gd, D * sizeof(REAL));
        memcpy((REAL *)job->grad_query + at, work->gx, D * sizeof(REAL));
        later_k = step;
    }
    for (int i = 0; i < D; i++) {
        REAL *row = work->G + (size_t)i * P;
        for (int c = 0; c < P; c += VLEN) ST(row + c, LD(row + c) - LD(work->gd + c) * later_k[i]);
    }
}

INLINE void NAME(delta_backward_pair)(int D, const Job *job, const NAME(work) *work, int64_t pair) {
    const int P = PD_OF(D);
    const int64_t batch = pair / job->H, pairs = job->B * job->H, size = (int64_t)D * D;
    NAME(delta_begin)(D, work->G, job->grad_final ? (const REAL *)job->grad_final + pair * size : 0);
    for (int64_t end = job->T, begin; end > 0; end = begin) {
        int64_t chunk = (end - 1) / CHUNK;
        int starts;
        for (begin = end - 1; !(starts = NAME(starts_at)(job, begin, batch)) && begin > chunk * CHUNK;) begin--;
        const REAL *from = 0;
        if (begin && !starts) from = (const REAL *)job->checkpoints + ((chunk - 1) * pairs + pair) * size;
        else if (job->shift && !starts) from = (const REAL *)job->shift + pair * size;
        NAME(delta_begin)(D, work->W, from);
        NAME(delta_span_backward)(D, job, work, pair, begin, end);
        if (starts) NAME(delta_begin)(D, work->G, 0);
    }
    if (job->grad_shift) NAME(copy_rows)(D, (REAL *)job->grad_shift + pair * size, D, work->G, P);
}

#undef PD_OF
#undef DELTA_STEP
