/* The delta rule, forward and backward; ../README.md has the equations.
 *
 * A head's W is [DR][PD]: rows by key, columns by value, both padded with zeros. The thread's memory is srwm_kernel.h's:
 * `x` is the value, `gr` the gradient of y, `gd` that of the value, `gx` that of the query. A step's record is k, q [DQ
 * each], then d = v - k W and e = rate * d [PD each].
 */

#define PD_OF(D) ROUND(D, VLEN)
#define DELTA_STEP(D) ((size_t)ROUND(2 * DQ_OF(D) + 2 * PD_OF(D), 16))

/* to = from + k (outer) e; out_a = a to; out_b = b to, unless b is NULL; nb vectors of a row at once, 1 or 2 */
INLINE void NAME(delta_edit_read_block)(int D, int P, int nb, const REAL *from, REAL *to, const REAL *k, const REAL *e,
                                    const REAL *a, const REAL *b, REAL *out_a, REAL *out_b) {
    vec sum_a[2][2], sum_b[2][2], edit[2]; /* even and odd rows: two chains for each sum */
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

INLINE void NAME(delta_edit_read)(int D, int P, const REAL *from, REAL *to, const REAL *k, const REAL *e, const REAL *a,
                              const REAL *b, REAL *out_a, REAL *out_b) {
    int c = 0;
    for (; c + VLEN < P; c += 2 * VLEN)
        NAME(delta_edit_read_block)(D, P, 2, from + c, to + c, k, e + c, a, b, out_a + c, b ? out_b + c : 0);
    if (c < P) NAME(delta_edit_read_block)(D, P, 1, from + c, to + c, k, e + c, a, b, out_a + c, b ? out_b + c : 0);
}

/* r = k W */
INLINE void NAME(delta_read)(int D, const NAME(work) *work, const REAL *k) {
    const int P = PD_OF(D);
    for (int c = 0; c < P; c += VLEN) NAME(read_block)(D, P, 1, work->W + c, k, 0, work->r + c);
}

/* to [D, n_to] = from [D, n_from], the first D columns */
INLINE void NAME(copy_rows)(int D, REAL *to, int n_to, const REAL *from, int n_from) {
    for (int i = 0; i < D; i++) memcpy(to + (size_t)i * n_to, from + (size_t)i * n_from, D * sizeof(REAL));
}

/* W [DR][PD] = from [D, D] (NULL: zeros), padded; an earlier pair may have left NaN in the padding */
INLINE void NAME(delta_begin)(int D, REAL *W, const REAL *from) {
    memset(W, 0, (size_t)DR_OF(D) * PD_OF(D) * sizeof(REAL));
    if (from) NAME(copy_rows)(D, W, PD_OF(D), from, D);
}

/* d = v - r, e = rate * d; v unpadded */
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
    REAL *W = work->W, *e = work->ge;

    NAME(delta_begin)(D, W, job->shift ? (const REAL *)job->shift + pair * size : 0);
    NAME(delta_read)(D, work, keys + pair * D);
    for (int64_t t = 0; t < job->T; t++) {
        const int64_t at = (t * pairs + pair) * D, next = t + 1 < job->T ? at + pairs * D : at;
        if (t && t % CHUNK == 0 && job->checkpoints)
            NAME(copy_rows)(D, NAME(checkpoint_at)(job, size, pair, t), D, W, P);
        if (starts_at(job, t, batch)) {
            NAME(delta_begin)(D, W, 0);
            memset(work->r, 0, P * sizeof(REAL));
        }
        NAME(delta_edit)(D, work, values + at, ((const REAL *)job->rate)[t * pairs + pair], work->gd, e);
        NAME(delta_edit_read)(D, P, W, W, keys + at, e, queries + at, keys + next, work->z, work->r);
        memcpy((REAL *)job->y + at, work->z, D * sizeof(REAL));
    }
    NAME(copy_rows)(D, (REAL *)job->final + pair * size, D, W, P);
}

/* Recompute steps [begin, end), storing each step's record and its W before the edit. */
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
        if (t + 1 < end) NAME(delta_edit_read)(D, P, W, W + slot, step, e, keys + at + pairs * D, 0, work->r, 0);
    }
}

/* G += q (outer) gy; G -= later_k (outer) gv, deferred from the later step; gk = G e; ge = k G */
INLINE void NAME(delta_edit_backward)(int D, const NAME(work) *work, const REAL *step, const REAL *later_k) {
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

/* gq = W gy + k (e . gy), the edited W times gy; gk -= W gv */
INLINE void NAME(delta_read_backward)(int D, const NAME(work) *work, const REAL *W, const REAL *step) {
    const int DQ = DQ_OF(D), P = PD_OF(D);
    const REAL *k = step, *e = k + 2 * DQ + P, *gy = work->gr, *gv = work->gd;
    const REAL edit = NAME(dot)(P, e, gy);
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
        for (int r = i; r < i + 4; r++) work->gx[r] += k[r] * edit, work->gk[r] -= work->gu[r];
    }
}

/* Backward through steps [begin, end) of one chunk, without resets; work->W is the first step's matrix. */
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
        if (later_k) NAME(delta_edit_backward)(D, work, step, later_k);
        else NAME(delta_edit_backward)(D, work, step, 0);
        ((REAL *)job->grad_rate)[t * pairs + pair] = NAME(dot)(P, work->ge, d);
        for (int c = 0; c < P; c += VLEN) ST(work->gd + c, LD(work->ge + c) * rate);
        NAME(delta_read_backward)(D, work, work->W + (t - begin) * slot, step);
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
    const int64_t size = (int64_t)D * D;
    NAME(delta_begin)(D, work->G, job->grad_final ? (const REAL *)job->grad_final + pair * size : 0);
    for (int64_t end = job->T, begin; end > 0; end = begin) {
        begin = span_begin(job, end, pair / job->H);
        NAME(delta_begin)(D, work->W, NAME(state_at)(job, size, pair, begin));
        NAME(delta_span_backward)(D, job, work, pair, begin, end);
        if (starts_at(job, begin, pair / job->H)) NAME(delta_begin)(D, work->G, 0);
    }
    if (job->grad_shift) NAME(copy_rows)(D, (REAL *)job->grad_shift + pair * size, D, work->G, PD_OF(D));
}
