/* The SRWM recurrence with a retention or a bound on the shift; ../README.md has the equations.
 *
 * The shift S, not W, is carried from step to step, and W = slow + S is computed at each. A norm is the root of a plain
 * sum of squares: of a shift beyond the square root of the largest number it is infinite.
 */

/* to = keep * from + k (outer) e; return the sum of squares of `to` */
INLINE REAL NAME(constrained_edit)(int D, int P, const REAL *from, REAL *to, REAL keep, const REAL *k, const REAL *e) {
    vec even = ZERO, odd = ZERO; /* two chains */
    for (int i = 0; i < D; i++) {
        size_t row = (size_t)i * P;
        int c = 0;
        for (; c + VLEN < P; c += 2 * VLEN) {
            vec a = LD(from + row + c) * keep + LD(e + c) * k[i];
            vec b = LD(from + row + c + VLEN) * keep + LD(e + c + VLEN) * k[i];
            ST(to + row + c, a), ST(to + row + c + VLEN, b);
            even += a * a, odd += b * b;
        }
        if (c < P) {
            vec a = LD(from + row + c) * keep + LD(e + c) * k[i];
            ST(to + row + c, a);
            even += a * a;
        }
    }
    return NAME(sum)(even + odd);
}

/* S *= factor */
INLINE void NAME(scale_matrix)(int D, int P, REAL *S, REAL factor) {
    for (size_t c = 0; c < (size_t)D * P; c += VLEN) ST(S + c, LD(S + c) * factor);
}

/* W = slow + S; r = x W */
INLINE void NAME(constrained_read)(int D, int P, const NAME(work) *work, const REAL *S, const REAL *x) {
    for (size_t c = 0; c < (size_t)D * P; c += VLEN) ST(work->W + c, LD(work->slow + c) + LD(S + c));
    NAME(read)(D, P, work->W, x, 0, work->r);
}

/* Run steps [begin, end) of one chunk, without resets, from the shift work->S on; y: NULL in backward.
 *
 * Step i's shift is work->S + i * slot (slot 0: in place), followed by the last step's result. Records are those of
 * `span`; work->scales has the factors of the bound.
 */
static TARGET void NAME(constrained_span)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair, int64_t begin,
                                   int64_t end, size_t slot, REAL *y) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const int64_t pairs = job->B * job->H;
    const REAL *x = (const REAL *)job->x + (begin * pairs + pair) * D, bound = (REAL)job->bound;
    REAL *S = work->S, *step = work->steps;
    for (int64_t t = begin; t < end; t++, x += pairs * D, S += slot, step += STEP_SIZE(D, E)) {
        REAL *k = step, *u = k + 2 * DQ, *rates = u + DQ, *e = rates + P;
        const REAL keep = job->retention ? ((const REAL *)job->retention)[t * pairs + pair] : 1;
        NAME(constrained_read)(D, P, work, S, x);
        if (y) memcpy(y + (t * pairs + pair) * E, work->r, E * sizeof(REAL));
        NAME(gates)(D, E, work, step);
        NAME(read)(D, P, work->W, u, rates, e);
        REAL norm = SQRT1(NAME(constrained_edit)(D, P, S, S + slot, keep, k, e)), scale = 0;
        if (bound > 0 && norm >= bound) { /* >=: torch.clamp has a gradient at the bound */
            scale = bound / norm;
            NAME(scale_matrix)(D, P, S + slot, scale);
        }
        work->scales[t - begin] = scale;
    }
}

/* to [DR][P] = from [D, C] (NULL: zeros), padded; an earlier pair may have left NaN in the padding, which norms include */
INLINE void NAME(load_matrix)(int D, int E, REAL *to, const REAL *from) {
    memset(to, 0, (size_t)DR_OF(D) * P_OF(D, E) * sizeof(REAL));
    if (from) NAME(pad)(D, E, to, from, 0);
}

/* to [D, C] = from [DR][P] */
INLINE void NAME(store_matrix)(int D, int E, REAL *to, const REAL *from) {
    const int C = C_OF(D, E);
    for (int i = 0; i < D; i++) memcpy(to + (size_t)i * C, from + (size_t)i * P_OF(D, E), C * sizeof(REAL));
}

static TARGET void NAME(constrained_forward_pair)(const Job *job, const NAME(work) *work, int64_t pair) {
    const int D = (int)job->D, E = (int)job->E;
    const int64_t batch = pair / job->H, size = (int64_t)D * C_OF(D, E);
    NAME(load_matrix)(D, E, work->slow, (const REAL *)job->weight + pair % job->H * size);
    NAME(load_matrix)(D, E, work->S, job->shift ? (const REAL *)job->shift + pair * size : 0);
    for (int64_t begin = 0, end; begin < job->T; begin = end) {
        end = span_end(job, begin, batch);
        if (begin && begin % CHUNK == 0 && job->checkpoints)
            NAME(store_matrix)(D, E, NAME(checkpoint_at)(job, size, pair, begin), work->S);
        if (starts_at(job, begin, batch)) NAME(load_matrix)(D, E, work->S, 0);
        NAME(constrained_span)(D, E, job, work, pair, begin, end, 0, (REAL *)job->y);
    }
    NAME(store_matrix)(D, E, (REAL *)job->final + pair * size, work->S);
}

/* ---- backward ---- */

/* G = scale * (G - S (S . G) / bound^2), where S has been scaled to norm `bound` */
INLINE void NAME(bound_backward)(int D, int P, REAL *G, const REAL *S, REAL scale, REAL bound) {
    vec product = ZERO;
    for (size_t c = 0; c < (size_t)D * P; c += VLEN) product += LD(G + c) * LD(S + c);
    const REAL dot = NAME(sum)(product) / bound / bound;
    for (size_t c = 0; c < (size_t)D * P; c += VLEN) ST(G + c, (LD(G + c) - LD(S + c) * dot) * scale);
}

/* W = slow + S; gk = G e; ge = k G. Return S . G, the gradient of the retention. */
INLINE REAL NAME(constrained_edit_backward)(int D, int P, const NAME(work) *work, const REAL *S, const REAL *k,
                                            const REAL *e) {
    REAL *ge = work->ge;
    vec product[4] = {ZERO, ZERO, ZERO, ZERO};
    for (int i = 0; i < DR_OF(D); i += 4) {
        const size_t at = (size_t)i * P;
        vec gk[4] = {ZERO, ZERO, ZERO, ZERO};
        for (int c = 0; c < P; c += VLEN) {
            vec e_c = LD(e + c), ge_c = ZERO;
            if (i) ge_c = LD(ge + c);
            UNROLL for (int r = 0; r < 4; r++) {
                const size_t here = at + (size_t)r * P + c;
                vec g = LD(work->G + here), s = LD(S + here);
                ST(work->W + here, LD(work->slow + here) + s);
                gk[r] += g * e_c;
                ge_c += g * k[i + r];
                product[r] += g * s;
            }
            ST(ge + c, ge_c);
        }
        NAME(sum4)(gk[0], gk[1], gk[2], gk[3], work->gk + i);
    }
    REAL dots[4];
    NAME(sum4)(product[0], product[1], product[2], product[3], dots);
    return dots[0] + dots[1] + dots[2] + dots[3];
}

/* g = u (outer) gd + x (outer) gr; A += g, the slow weight's gradient; G = keep * G + g; gx = W gr */
INLINE void NAME(constrained_read_backward)(int D, int P, const NAME(work) *work, const REAL *u, REAL keep) {
    const REAL *gd = work->gd, *gr = work->gr, *x = work->x;
    for (int i = 0; i < DR_OF(D); i += 4) {
        const size_t at = (size_t)i * P;
        vec gx[4] = {ZERO, ZERO, ZERO, ZERO};
        for (int c = 0; c < P; c += VLEN) {
            vec gd_c = LD(gd + c), gr_c = LD(gr + c);
            UNROLL for (int r = 0; r < 4; r++) {
                const size_t here = at + (size_t)r * P + c;
                vec g = gd_c * u[i + r];
                g += gr_c * x[i + r];
                ST(work->A + here, LD(work->A + here) + g);
                ST(work->G + here, LD(work->G + here) * keep + g);
                gx[r] += gr_c * LD(work->W + here);
            }
        }
        NAME(sum4)(gx[0], gx[1], gx[2], gx[3], work->gx + i);
    }
}

/* Backward through steps [begin, end) of one chunk, without resets; work->S is the first step's shift. */
static TARGET void NAME(constrained_span_backward)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair,
                                            int64_t begin, int64_t end) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const size_t slot = ROUND((size_t)DR_OF(D) * P, 16);
    const REAL bound = (REAL)job->bound;
    NAME(constrained_span)(D, E, job, work, pair, begin, end, slot, 0);
    for (int64_t t = end - 1; t >= begin; t--) {
        const REAL *step = work->steps + (t - begin) * STEP_SIZE(D, E), *S = work->S + (t - begin) * slot;
        const REAL *u = step + 2 * DQ, *rates = u + DQ, *e = rates + P, scale = work->scales[t - begin];
        const int64_t at = t * job->B * job->H + pair;
        if (scale > 0) NAME(bound_backward)(D, P, work->G, S + slot, scale, bound);
        const REAL keep = job->retention ? ((const REAL *)job->retention)[at] : 1;
        REAL kept = NAME(constrained_edit_backward)(D, P, work, S, step, e);
        /* Where the bound scaled the shift, G is orthogonal to the new shift, so -ge . e / keep equals S . G. It is the
         * more precise one where the edit is less than half of that shift, as S . G may cancel. */
        if (scale > 0 && 4 * NAME(dot)(DQ, step, step) * NAME(dot)(P, e, e) * scale * scale < bound * bound)
            kept = -NAME(dot)(P, work->ge, e) / keep;
        if (job->grad_retention) ((REAL *)job->grad_retention)[at] = kept;
        for (int c = 0; c < P; c += VLEN) ST(work->gd + c, LD(work->ge + c) * LD(rates + c));
        NAME(row_dots)(DR_OF(D), P, work->W, work->gd, work->gu);
        NAME(gates_backward)(D, E, work, step, NAME(grad_y_at)(E, job, at));
        memcpy(work->x, (const REAL *)job->x + at * D, D * sizeof(REAL));
        NAME(constrained_read_backward)(D, P, work, u, keep);
        memcpy((REAL *)job->grad_x + at * D, work->gx, D * sizeof(REAL));
    }
}

static TARGET void NAME(constrained_backward_pair)(const Job *job, const NAME(work) *work, int64_t pair) {
    const int D = (int)job->D, E = (int)job->E;
    const int64_t size = (int64_t)D * C_OF(D, E);
    NAME(load_matrix)(D, E, work->slow, (const REAL *)job->weight + pair % job->H * size);
    NAME(load_matrix)(D, E, work->G, job->grad_final ? (const REAL *)job->grad_final + pair * size : 0);
    NAME(load_matrix)(D, E, work->A, 0);
    for (int64_t end = job->T, begin; end > 0; end = begin) {
        begin = span_begin(job, end, pair / job->H);
        NAME(load_matrix)(D, E, work->S, NAME(state_at)(job, size, pair, begin));
        NAME(constrained_span_backward)(D, E, job, work, pair, begin, end);
        if (starts_at(job, begin, pair / job->H)) NAME(load_matrix)(D, E, work->G, 0);
    }
    NAME(store_matrix)(D, E, (REAL *)job->grad_weight + pair * size, work->A);
    if (job->grad_shift) NAME(store_matrix)(D, E, (REAL *)job->grad_shift + pair * size, work->G);
}
