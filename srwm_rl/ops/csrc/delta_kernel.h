/* The delta rule, forward and backward; ../README.md has the equations.
 *
 * A head's W is [DR][PD]: rows by key, columns by value, both padded with zeros. The thread's memory is srwm_kernel.h's:
 * `x` is the value, `gr` the gradient of y, `gd` that of the value, `gx` that of the query. A step's record is k, q [DQ
 * each], then d = v - k W and e = rate * d [PD each].
 */

#define PD_OF(D) ROUND(D, VLEN)
#define DELTA_STEP(D) ((size_t)ROUND(2 * DQ_OF(D) + 2 * PD_OF(D), 16))

/* to = from + k (outer) e; out_a = a to; unless b is NULL: out_b = b to */
INLINE void NAME(delta_edit_read)(int D, int P, const REAL *from, REAL *to, const REAL *k, const REAL *e, const REAL *a,
                                  const REAL *b, REAL *out_a, REAL *out_b) {
    for (int c = 0; c < P; c += VLEN) {
        vec sum_a[4] = {ZERO, ZERO, ZERO, ZERO}, sum_b[4] = {ZERO, ZERO, ZERO, ZERO}; /* chains, as in read_block */
        const vec edit = LD(e + c);
        for (int i = 0; i < D; i += 4) {
            UNROLL for (int r = 0; r < 4; r++) {
                if (i + r >= D) break;
                const size_t at = (size_t)(i + r) * P + c;
                const vec w = LD(from + at) + edit * k[i + r];
                ST(to + at, w);
                sum_a[r] += w * a[i + r];
                if (b) sum_b[r] += w * b[i + r];
            }
        }
        ST(out_a + c, sum_a[0] + sum_a[1] + (sum_a[2] + sum_a[3]));
        if (b) ST(out_b + c, sum_b[0] + sum_b[1] + (sum_b[2] + sum_b[3]));
    }
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

/* Run steps [begin, end) of one chunk, without resets, from the matrix work->W on; y: NULL in backward.
 *
 * Step i's matrix is work->W + i * slot (slot 0: in place), its record work->steps + i * DELTA_STEP. In backward the last
 * step's edit is recorded, not made.
 */
INLINE void NAME(delta_span)(int D, const Job *job, const NAME(work) *work, int64_t pair, int64_t begin, int64_t end,
                             size_t slot, REAL *y) {
    const int DQ = DQ_OF(D), P = PD_OF(D);
    const int64_t pairs = job->B * job->H;
    const REAL *keys = (const REAL *)job->x;
    REAL *W = work->W, *step = work->steps;
    NAME(read)(D, P, W, keys + (begin * pairs + pair) * D, 0, work->r);
    for (int64_t t = begin; t < end; t++, W += slot, step += DELTA_STEP(D)) {
        const int64_t at = (t * pairs + pair) * D;
        const REAL *next = keys + (t + 1 < end ? at + pairs * D : at);
        REAL *q = step + DQ, *d = q + DQ, *e = d + P;
        memcpy(step, keys + at, D * sizeof(REAL));
        memcpy(q, (const REAL *)job->query + at, D * sizeof(REAL));
        NAME(delta_edit)(D, work, (const REAL *)job->value + at, ((const REAL *)job->rate)[t * pairs + pair], d, e);
        if (y) {
            NAME(delta_edit_read)(D, P, W, W, step, e, q, next, work->z, work->r);
            memcpy(y + at, work->z, D * sizeof(REAL));
        } else if (t + 1 < end) {
            NAME(delta_edit_read)(D, P, W, W + slot, step, e, next, 0, work->r, 0);
        }
    }
}

INLINE void NAME(delta_forward_pair)(int D, const Job *job, const NAME(work) *work, int64_t pair) {
    const int64_t batch = pair / job->H, size = (int64_t)D * D;
    NAME(load_matrix)(D, D, work->W, job->shift ? (const REAL *)job->shift + pair * size : 0);
    for (int64_t begin = 0, end; begin < job->T; begin = end) {
        end = span_end(job, begin, batch);
        if (begin && begin % CHUNK == 0 && job->checkpoints)
            NAME(store_matrix)(D, D, NAME(checkpoint_at)(job, size, pair, begin), work->W);
        if (starts_at(job, begin, batch)) NAME(load_matrix)(D, D, work->W, 0);
        NAME(delta_span)(D, job, work, pair, begin, end, 0, (REAL *)job->y);
    }
    NAME(store_matrix)(D, D, (REAL *)job->final + pair * size, work->W);
}

/* Backward through steps [begin, end) of one chunk, without resets; work->W is the first step's matrix. */
INLINE void NAME(delta_span_backward)(int D, const Job *job, const NAME(work) *work, int64_t pair, int64_t begin,
                                      int64_t end) {
    const int DQ = DQ_OF(D), P = PD_OF(D);
    const size_t slot = ROUND((size_t)DR_OF(D) * P, 16);
    const int64_t pairs = job->B * job->H;
    REAL *gy = work->gr, *gv = work->gd, *minus_gv = work->products;
    NAME(delta_span)(D, job, work, pair, begin, end, slot, 0);
    const REAL *later_k = 0;
    for (int64_t t = end - 1; t >= begin; t--) {
        const REAL *k = work->steps + (t - begin) * DELTA_STEP(D), *q = k + DQ, *d = q + DQ, *e = d + P;
        const REAL rate = ((const REAL *)job->rate)[t * pairs + pair], *W = work->W + (t - begin) * slot;
        const int64_t at = (t * pairs + pair) * D;
        if (job->grad_y) memcpy(gy, (const REAL *)job->grad_y + at, D * sizeof(REAL));
        if (later_k) NAME(edit_backward)(D, P, work, q, gy, later_k, minus_gv, 0, k, e);
        else NAME(edit_backward)(D, P, work, q, gy, 0, 0, 0, k, e);
        ((REAL *)job->grad_rate)[t * pairs + pair] = NAME(dot)(P, work->ge, d);
        for (int c = 0; c < P; c += VLEN) ST(gv + c, LD(work->ge + c) * rate), ST(minus_gv + c, -LD(gv + c));
        /* gq = W gy + k (e . gy), the edited W times gy; gk -= W gv */
        NAME(row_dots)(DR_OF(D), P, W, gy, work->gx);
        NAME(row_dots)(DR_OF(D), P, W, gv, work->gu);
        const REAL edit = NAME(dot)(P, e, gy);
        for (int i = 0; i < D; i++) work->gx[i] += k[i] * edit, work->gk[i] -= work->gu[i];
        memcpy((REAL *)job->grad_x + at, work->gk, D * sizeof(REAL));
        memcpy((REAL *)job->grad_value + at, gv, D * sizeof(REAL));
        memcpy((REAL *)job->grad_query + at, work->gx, D * sizeof(REAL));
        later_k = k;
    }
    for (int i = 0; i < D; i++) {
        REAL *row = work->G + (size_t)i * P;
        for (int c = 0; c < P; c += VLEN) ST(row + c, LD(row + c) + LD(minus_gv + c) * later_k[i]);
    }
}

INLINE void NAME(delta_backward_pair)(int D, const Job *job, const NAME(work) *work, int64_t pair) {
    const int64_t size = (int64_t)D * D;
    NAME(load_matrix)(D, D, work->G, job->grad_final ? (const REAL *)job->grad_final + pair * size : 0);
    for (int64_t end = job->T, begin; end > 0; end = begin) {
        begin = span_begin(job, end, pair / job->H);
        NAME(load_matrix)(D, D, work->W, NAME(state_at)(job, size, pair, begin));
        NAME(delta_span_backward)(D, job, work, pair, begin, end);
        if (starts_at(job, begin, pair / job->H)) NAME(load_matrix)(D, D, work->G, 0);
    }
    if (job->grad_shift) NAME(store_matrix)(D, D, (REAL *)job->grad_shift + pair * size, work->G);
}
