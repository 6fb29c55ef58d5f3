/* The SRWM recurrence whose shift S fades, is held below a bound, or both; srwm_kernel.h includes this and lends it its
 * tools.
 *
 * Equations and names: ../README.md. Here S, not W, goes from step to step: W = slow + S is made anew each time, and a
 * span's slots hold the steps' S, one more than there are steps. Norms are sums of squares as they come: a shift beyond
 * the square root of the largest number has an infinite norm.
 */

/* to = keep * from + k (outer) e; return the sum of squares of `to` */
INLINE REAL NAME(held_write)(int D, int P, const REAL *from, REAL *to, REAL keep, const REAL *k, const REAL *e) {
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
    REAL squares, again;
    even += odd;
    REDUCE2(ADD, even, even, squares, again);
    (void)again;
    return squares;
}

/* S *= factor */
INLINE void NAME(held_scale)(int D, int P, REAL *S, REAL factor) {
    for (size_t c = 0; c < (size_t)D * P; c += VLEN) ST(S + c, LD(S + c) * factor);
}

/* W = slow + S; r = x W, by blocks of columns as in `read` */
INLINE void NAME(held_read_block)(int D, int P, int nb, const REAL *slow, const REAL *S, REAL *W, const REAL *x,
                                  REAL *r) {
    vec sum[8];
    UNROLL for (int v = 0; v < nb; v++) sum[v] = ZERO;
    for (int i = 0; i < D; i++) {
        size_t row = (size_t)i * P;
        UNROLL for (int v = 0; v < nb; v++) {
            vec w = LD(slow + row + v * VLEN) + LD(S + row + v * VLEN);
            ST(W + row + v * VLEN, w);
            sum[v] += w * x[i];
        }
    }
    UNROLL for (int v = 0; v < nb; v++) ST(r + v * VLEN, sum[v]);
}

INLINE void NAME(held_read)(int D, int P, const REAL *slow, const REAL *S, REAL *W, const REAL *x, REAL *r) {
#define CALL(nb) NAME(held_read_block)(D, P, nb, slow + c, S + c, W + c, x, r + c)
    BLOCKS(8, P, CALL);
#undef CALL
}

INLINE REAL NAME(held_root)(REAL squares) {
#ifdef REAL_IS_DOUBLE
    return sqrt(squares);
#else
    return sqrtf(squares);
#endif
}

/* Run steps [begin, end) of one chunk, no reset between them, from the shift work->S on.
 *
 * Step i's shift is work->S + i * slot (slot 0: in place); the one that the last step leaves comes after the others.
 * Records are as `span` writes them, and work->scales says what the bound did.
 */
static TARGET void NAME(held_span)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair, int64_t begin,
                                   int64_t end, size_t slot, REAL *y) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const int64_t pairs = job->B * job->H;
    const REAL *x = (const REAL *)job->x + (begin * pairs + pair) * D, bound = (REAL)job->bound;
    REAL *S = work->S, *step = work->steps;
    for (int64_t t = begin; t < end; t++, x += pairs * D, S += slot, step += STEP_SIZE(D, E)) {
        REAL *k = step, *u = k + 2 * DQ, *rates = u + DQ, *e = rates + P;
        const REAL keep = job->retention ? ((const REAL *)job->retention)[t * pairs + pair] : 1;
        NAME(held_read)(D, P, work->slow, S, work->W, x, work->r);
        if (y) memcpy(y + (t * pairs + pair) * E, work->r, E * sizeof(REAL));
        NAME(gates)(D, E, work, step);
        NAME(read)(D, P, work->W, u, rates, e);
        REAL norm = NAME(held_root)(NAME(held_write)(D, P, S, S + slot, keep, k, e)), scale = 0;
        if (bound > 0 && norm >= bound) { /* at the bound too, as torch.clamp has its gradient */
            scale = bound / norm;
            NAME(held_scale)(D, P, S + slot, scale);
        }
        work->scales[t - begin] = scale;
    }
}

/* to [DR][P] = from [D, C] (NULL: zeros), padded. The padding is zeroed too: what is not a number may have got into it,
 * and norms see it. */
INLINE void NAME(held_begin)(int D, int E, REAL *to, const REAL *from) {
    memset(to, 0, (size_t)DR_OF(D) * P_OF(D, E) * sizeof(REAL));
    if (from) NAME(pad)(D, E, to, from, 0);
}

/* to [D, C] = from [DR][P] */
INLINE void NAME(held_end)(int D, int E, REAL *to, const REAL *from) {
    const int C = C_OF(D, E);
    for (int i = 0; i < D; i++) memcpy(to + (size_t)i * C, from + (size_t)i * P_OF(D, E), C * sizeof(REAL));
}

INLINE void NAME(held_forward_pair)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair) {
    const int64_t batch = pair / job->H, pairs = job->B * job->H, size = (int64_t)D * C_OF(D, E);
    REAL *checkpoints = (REAL *)job->checkpoints;
    NAME(held_begin)(D, E, work->slow, (const REAL *)job->weight + pair % job->H * size);
    NAME(held_begin)(D, E, work->S, job->shift ? (const REAL *)job->shift + pair * size : 0);
    for (int64_t begin = 0, end; begin < job->T; begin = end) {
        int64_t chunk = begin / CHUNK, stop = (chunk + 1) * CHUNK < job->T ? (chunk + 1) * CHUNK : job->T;
        if (begin % CHUNK == 0 && begin && checkpoints)
            NAME(held_end)(D, E, checkpoints + ((chunk - 1) * pairs + pair) * size, work->S);
        for (end = begin + 1; end < stop && !NAME(starts_at)(job, end, batch);) end++;
        if (NAME(starts_at)(job, begin, batch)) NAME(held_begin)(D, E, work->S, 0);
        NAME(held_span)(D, E, job, work, pair, begin, end, 0, (REAL *)job->y);
    }
    NAME(held_end)(D, E, (REAL *)job->final + pair * size, work->S);
}

/* ---- backward ---- */

/* G = scale * (G - S (S . G) / bound^2), where S, of norm `bound`, is what `scale` made */
INLINE void NAME(held_project)(int D, int P, REAL *G, const REAL *S, REAL scale, REAL bound) {
    vec product = ZERO;
    for (size_t c = 0; c < (size_t)D * P; c += VLEN) product += LD(G + c) * LD(S + c);
    REAL dot, again;
    REDUCE2(ADD, product, product, dot, again);
    (void)again;
    dot = dot / bound / bound;
    for (size_t c = 0; c < (size_t)D * P; c += VLEN) ST(G + c, (LD(G + c) - LD(S + c) * dot) * scale);
}

/* Four rows at a time: W = slow + S; gk = G e; ge = k G. Return S . G, the gradient of the retention. */
INLINE REAL NAME(held_pull_back)(int D, int P, const NAME(work) *work, const REAL *S, const REAL *k, const REAL *e) {
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

/* Four rows at a time: g = u (outer) gd + x (outer) gr; A += g, for the slow weight; G = keep * G + g; gx = W gr */
INLINE void NAME(held_gradients)(int D, int P, const NAME(work) *work, const REAL *u, REAL keep) {
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

/* Go back from `end` to `begin`, a span without resets inside one chunk; work->S holds its first shift. */
static TARGET void NAME(held_span_backward)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair,
                                            int64_t begin, int64_t end) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const size_t slot = ROUND((size_t)DR_OF(D) * P, 16);
    const REAL bound = (REAL)job->bound;
    NAME(held_span)(D, E, job, work, pair, begin, end, slot, 0);
    for (int64_t t = end - 1; t >= begin; t--) {
        const REAL *step = work->steps + (t - begin) * STEP_SIZE(D, E), *S = work->S + (t - begin) * slot;
        const REAL *u = step + 2 * DQ, *rates = u + DQ, *e = rates + P, scale = work->scales[t - begin];
        const int64_t at = t * job->B * job->H + pair;
        if (scale > 0) NAME(held_project)(D, P, work->G, S + slot, scale, bound);
        const REAL keep = job->retention ? ((const REAL *)job->retention)[at] : 1;
        REAL kept = NAME(held_pull_back)(D, P, work, S, step, e);
        /* Where the bound acted, G is at right angles to the new shift, so that S . G is also what the edit gives: the
         * sharper one where the edit is less than half of that shift, as S . G may be the small rest of a sum. */
        if (scale > 0 && 4 * NAME(dot)(DQ, step, step) * NAME(dot)(P, e, e) * scale * scale < bound * bound)
            kept = -NAME(dot)(P, work->ge, e) / keep;
        if (job->grad_retention) ((REAL *)job->grad_retention)[at] = kept;
        for (int c = 0; c < P; c += VLEN) ST(work->gd + c, LD(work->ge + c) * LD(rates + c));
        NAME(row_dots)(DR_OF(D), P, work->W, work->gd, work->gu);
        NAME(gates_backward)(D, E, work, step, NAME(grad_y_at)(E, job, at));
        memcpy(work->x, (const REAL *)job->x + at * D, D * sizeof(REAL));
        NAME(held_gradients)(D, P, work, u, keep);
        memcpy((REAL *)job->grad_x + at * D, work->gx, D * sizeof(REAL));
    }
}

INLINE void NAME(held_backward_pair)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair) {
    const int64_t batch = pair / job->H, pairs = job->B * job->H, size = (int64_t)D * C_OF(D, E);
    NAME(held_begin)(D, E, work->slow, (const REAL *)job->weight + pair % job->H * size);
    NAME(held_begin)(D, E, work->G, job->grad_final ? (const REAL *)job->grad_final + pair * size : 0);
    NAME(held_begin)(D, E, work->A, 0);
    for (int64_t end = job->T, begin; end > 0; end = begin) {
        int64_t chunk = (end - 1) / CHUNK;
        int starts;
        for (begin = end - 1; !(starts = NAME(starts_at)(job, begin, batch)) && begin > chunk * CHUNK;) begin--;
        const REAL *from = 0;
        if (begin && !starts) from = (const REAL *)job->checkpoints + ((chunk - 1) * pairs + pair) * size;
        else if (job->shift && !starts) from = (const REAL *)job->shift + pair * size;
        NAME(held_begin)(D, E, work->S, from);
        NAME(held_span_backward)(D, E, job, work, pair, begin, end);
        if (starts) NAME(held_begin)(D, E, work->G, 0);
    }
    NAME(held_end)(D, E, (REAL *)job->grad_weight + pair * size, work->A);
    if (job->grad_shift) NAME(held_end)(D, E, (REAL *)job->grad_shift + pair * size, work->G);
}
