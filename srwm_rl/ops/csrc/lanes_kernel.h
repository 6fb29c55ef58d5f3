/* The SRWM recurrence of small heads in single precision, VLEN neighbouring (batch, head) pairs at once: every lane of a
 * vector belongs to a pair of its own.
 *
 * All matrices are [D][C][VLEN]: nothing is padded or summed across lanes; inputs and outputs of a pair are transposed.
 * No lane's result depends on the other lanes or on VLEN. Where an episode starts in some lanes only, what the step then
 * does differently is computed for all and selected by a mask.
 */

#define NTH(p, i) ((p) + (size_t)(i) * VLEN) /* number i of every lane */
#define EDIT_SIZE(D) ((size_t)(D) + C_OF(D, D))
#define GATES_SIZE(D) ((size_t)(4 * (D) + 4))
#define ROWS (VLEN == 16 ? 4 : 2) /* rows and columns of a block whose sums fit the registers; COLUMNS divides D and C */
#define COLUMNS 4

typedef struct {
    int64_t first, batch, batches; /* the first pair, its batch entry, and the number of entries that the lanes cover */
    int n;                         /* lanes in use; the others compute zeros */
    REAL *slow, *S, *W;            /* the slow weights, the shifts and their sums */
    REAL *kept;                    /* backward: the matrix before each episode start of a chunk but at its first step */
    REAL *edits;                   /* for each step of a chunk: k [D], e [C] */
    REAL *gates;                   /* q, u, x, k [D], rates [4]; backward: for each step of a chunk */
    REAL *r;                       /* x W [C] */
    REAL *G, *A;                   /* backward: the gradients of W and of the slow weight */
    REAL *ge, *gd, *gr;            /* backward: gradients of e, d and r [C] */
    REAL *gk, *gu, *gx;            /* backward: gradients of k, u and x [D] */
    REAL *scratch;                 /* matrices, pair by pair */
    void *block;
} NAME(lanes);

static TARGET int NAME(lanes_new)(NAME(lanes) *work, int D, int backward) {
    const size_t C = C_OF(D, D), vector = C * VLEN, matrix = D * vector;
    const NAME(part) parts[] = {{&work->slow, matrix},
                                {&work->S, matrix},
                                {&work->W, matrix},
                                {&work->kept, backward ? (CHUNK - 1) * matrix : 0},
                                {&work->edits, CHUNK * EDIT_SIZE(D) * VLEN},
                                {&work->gates, (backward ? CHUNK : 1) * GATES_SIZE(D) * VLEN},
                                {&work->r, vector},
                                {&work->G, backward ? matrix : 0},
                                {&work->A, backward ? matrix : 0},
                                {&work->ge, vector},
                                {&work->gd, vector},
                                {&work->gr, vector},
                                {&work->gk, D * VLEN},
                                {&work->gu, D * VLEN},
                                {&work->gx, D * VLEN},
                                {&work->scratch, matrix}};
    work->block = NAME(allocate)(parts, sizeof(parts) / sizeof(parts[0]));
    return work->block != 0;
}

/* ---- transposes between arrays, pair by pair, and lanes ---- */

/* [VLEN][m] from [n][m]: zeros for lanes not in use */
INLINE const REAL *NAME(padded_lanes)(const NAME(lanes) *work, const REAL *from, int m) {
    if (work->n == VLEN) return from;
    memcpy(work->scratch, from, (size_t)work->n * m * sizeof(REAL));
    memset(work->scratch + (size_t)work->n * m, 0, (size_t)(VLEN - work->n) * m * sizeof(REAL));
    return work->scratch;
}

/* to [m][VLEN] = from [n][m], m of 2, 4 or 8 */
INLINE void NAME(load_row)(const NAME(lanes) *work, int m, const REAL *from, REAL *to) {
    vec a[8];
    from = NAME(padded_lanes)(work, from, m);
    UNROLL for (int i = 0; i < m; i++) a[i] = LDU(NTH(from, i));
    NAME(interleave)(m, VLEN, a);
    UNROLL for (int i = 0; i < m; i++) ST(NTH(to, i), a[i]);
}

/* to [n][m] = from [m][VLEN] */
INLINE void NAME(store_row)(const NAME(lanes) *work, int m, const REAL *from, REAL *to) {
    vec a[8];
    REAL *whole = work->n == VLEN ? to : work->scratch;
    UNROLL for (int i = 0; i < m; i++) a[i] = LD(NTH(from, i));
    NAME(interleave)(m, m, a);
    UNROLL for (int i = 0; i < m; i++) STU(NTH(whole, i), a[i]);
    if (whole != to) memcpy(to, whole, (size_t)work->n * m * sizeof(REAL));
}

/* to [D][C][VLEN] = from [pairs][D][C] at the lanes' pairs; NULL: zeros */
INLINE void NAME(load_matrices)(int D, const NAME(lanes) *work, const REAL *from, REAL *to) {
    const int size = D * C_OF(D, D);
    if (from)
        NAME(transpose)(NAME(padded_lanes)(work, from + work->first * size, size), size, VLEN, size, to, VLEN);
    else
        memset(to, 0, (size_t)size * VLEN * sizeof(REAL));
}

INLINE void NAME(store_matrices)(int D, const NAME(lanes) *work, const REAL *from, REAL *to) {
    const int size = D * C_OF(D, D);
    to += work->first * size;
    REAL *whole = work->n == VLEN ? to : work->scratch;
    NAME(transpose)(from, VLEN, size, VLEN, whole, size);
    if (whole != to) memcpy(to, whole, (size_t)work->n * size * sizeof(REAL));
}

/* Set the lanes to the pairs from `first` on, and load their slow weights. */
INLINE void NAME(lanes_load)(int D, const Job *job, NAME(lanes) *work, int64_t first) {
    const int64_t left = job->B * job->H - first;
    const int size = D * C_OF(D, D);
    work->first = first;
    work->n = left < VLEN ? (int)left : VLEN;
    work->batch = first / job->H;
    work->batches = (first + work->n - 1) / job->H + 1 - work->batch;
    memset(work->scratch, 0, (size_t)size * VLEN * sizeof(REAL));
    for (int lane = 0; lane < work->n; lane++) {
        const REAL *slow = (const REAL *)job->weight + (first + lane) % job->H * size;
        memcpy(work->scratch + (size_t)lane * size, slow, size * sizeof(REAL));
    }
    NAME(transpose)(work->scratch, size, VLEN, size, work->slow, VLEN);
}

/* where = the mask of the lanes in which an episode starts at step t; return 0 if there is none. */
INLINE int NAME(lanes_starting)(const Job *job, const NAME(lanes) *work, int64_t t, ivec *where) {
    if (!job->starts) return 0;
    const unsigned char *starts = job->starts + t * job->B + work->batch;
    int any = 0;
    for (int64_t b = 0; b < work->batches; b++) any |= starts[b];
    if (!any) return 0;
    for (int lane = 0; lane < VLEN; lane++)
        (*where)[lane] = lane < work->n && starts[(work->first + lane) / job->H - work->batch] ? -1 : 0;
    return 1;
}

/* ---- forward ---- */

INLINE void NAME(lanes_softmax)(int D, const REAL *logits, REAL *out) {
    vec most = LD(logits), sum = ZERO;
    for (int i = 1; i < D; i++) most = VMAX(most, LD(NTH(logits, i)));
    for (int i = 0; i < D; i++) {
        vec e = NAME(exp)(LD(NTH(logits, i)) - most);
        ST(NTH(out, i), e);
        sum += e;
    }
    sum = 1 / sum;
    for (int i = 0; i < D; i++) ST(NTH(out, i), LD(NTH(out, i)) * sum);
}

/* out = a W, multiplied by the column's rate unless `rates` is NULL */
INLINE void NAME(lanes_read)(int D, const REAL *W, const REAL *a, const REAL *rates, REAL *out) {
    const int C = C_OF(D, D);
    for (int c = 0; c < C; c += COLUMNS) {
        vec even[COLUMNS], odd[COLUMNS]; /* two chains hide the multiply-add's latency */
        UNROLL for (int v = 0; v < COLUMNS; v++) even[v] = odd[v] = ZERO;
        for (int i = 0; i < D; i += 2) {
            const vec a_even = LD(NTH(a, i)), a_odd = LD(NTH(a, i + 1));
            const REAL *at = NTH(W, i * C + c);
            UNROLL for (int v = 0; v < COLUMNS; v++) even[v] += LD(NTH(at, v)) * a_even;
            UNROLL for (int v = 0; v < COLUMNS; v++) odd[v] += LD(NTH(at, C + v)) * a_odd;
        }
        UNROLL for (int v = 0; v < COLUMNS; v++) {
            vec sum = even[v] + odd[v];
            if (rates) sum *= LD(NTH(rates, c / D));
            ST(NTH(out, c + v), sum);
        }
    }
}

/* W += k (outer) e; out = a W */
INLINE void NAME(lanes_edit_read)(int D, REAL *W, const REAL *k, const REAL *e, const REAL *a, REAL *out) {
    const int C = C_OF(D, D);
    for (int c = 0; c < C; c += COLUMNS) {
        vec sum[COLUMNS], edit[COLUMNS];
        UNROLL for (int v = 0; v < COLUMNS; v++) sum[v] = ZERO, edit[v] = LD(NTH(e, c + v));
        for (int i = 0; i < D; i++) {
            const vec k_i = LD(NTH(k, i)), a_i = LD(NTH(a, i));
            REAL *at = NTH(W, i * C + c);
            UNROLL for (int v = 0; v < COLUMNS; v++) {
                const vec w = LD(NTH(at, v)) + edit[v] * k_i;
                ST(NTH(at, v), w);
                sum[v] += w * a_i;
            }
        }
        UNROLL for (int v = 0; v < COLUMNS; v++) ST(NTH(out, c + v), sum[v]);
    }
}

/* to = where ? from : to, for n numbers; from NULL: zeros */
INLINE void NAME(assign_where)(int n, ivec where, const REAL *from, REAL *to) {
    for (int i = 0; i < n; i++) ST(NTH(to, i), SELECT(where, from ? LD(NTH(from, i)) : ZERO, LD(NTH(to, i))));
}

/* Run steps [begin, end) of one chunk from the shift work->S on; W is then the last step's matrix, before its edit.
 *
 * In backward (`back`), each step's gates and the matrix before each episode start are stored, and S is invalid
 * afterwards. In forward, S and the recorded edits are zeroed at an episode start. Return the end of the stored matrices.
 */
INLINE REAL *NAME(lanes_span)(int D, const Job *job, const NAME(lanes) *work, int64_t begin, int64_t end, int back) {
    const int C = C_OF(D, D), size = D * C;
    const int64_t pairs = job->B * job->H;
    REAL *W = work->W, *k = work->edits, *gates = work->gates, *kept = work->kept;
    ivec where;
    if (NAME(lanes_starting)(job, work, begin, &where)) NAME(assign_where)(size, where, 0, work->S);
    for (int i = 0; i < size; i++) ST(NTH(W, i), LD(NTH(work->slow, i)) + LD(NTH(work->S, i)));
    for (int64_t t = begin; t < end; t++, k = NTH(k, EDIT_SIZE(D))) {
        REAL *e = NTH(k, D), *q = gates, *u = NTH(q, D), *x = NTH(u, D), *rates = NTH(x, D);
        const int64_t at = (t * pairs + work->first) * D;
        NAME(load_row)(work, D, (const REAL *)job->x + at, x);
        if (t == begin) {
            NAME(lanes_read)(D, W, x, 0, work->r);
        } else {
            const REAL *last = k - EDIT_SIZE(D) * VLEN;
            NAME(lanes_edit_read)(D, W, last, NTH(last, D), x, work->r);
            if (NAME(lanes_starting)(job, work, t, &where)) {
                if (back) {
                    memcpy(kept, W, (size_t)size * VLEN * sizeof(REAL));
                    kept = NTH(kept, size);
                } else {
                    NAME(assign_where)(size, where, 0, work->S);
                    NAME(assign_where)((int)((t - begin) * EDIT_SIZE(D)), where, 0, work->edits);
                }
                NAME(assign_where)(size, where, work->slow, W);
                NAME(lanes_read)(D, W, x, 0, e); /* its rounding differs from r's, so only these lanes take it */
                NAME(assign_where)(C, where, e, work->r);
            }
        }
        if (!back) NAME(store_row)(work, D, work->r, (REAL *)job->y + at);
        NAME(lanes_softmax)(D, NTH(work->r, D), q);
        NAME(lanes_softmax)(D, NTH(work->r, 2 * D), k);
        for (int i = 0; i < D; i++) ST(NTH(u, i), LD(NTH(q, i)) - LD(NTH(k, i)));
        for (int g = 0; g < 4; g++) ST(NTH(rates, g), NAME(sigmoid)(LD(NTH(work->r, 3 * D + g))));
        NAME(lanes_read)(D, W, u, rates, e);
        if (back) gates = NTH(gates, GATES_SIZE(D));
    }
    return kept;
}

/* S += the sum of the recorded edits of `count` steps */
INLINE void NAME(lanes_add_edits)(int D, const REAL *edits, int count, REAL *S) {
    const int C = C_OF(D, D);
    for (int i = 0; i < D; i += ROWS) {
        for (int c = 0; c < C; c += COLUMNS) {
            vec sum[ROWS][COLUMNS];
            UNROLL for (int r = 0; r < ROWS; r++) {
                UNROLL for (int v = 0; v < COLUMNS; v++) sum[r][v] = ZERO;
            }
            const REAL *k = edits;
            for (int t = 0; t < count; t++, k = NTH(k, EDIT_SIZE(D))) {
                vec e[COLUMNS];
                UNROLL for (int v = 0; v < COLUMNS; v++) e[v] = LD(NTH(k, D + c + v));
                UNROLL for (int r = 0; r < ROWS; r++) {
                    const vec k_i = LD(NTH(k, i + r));
                    UNROLL for (int v = 0; v < COLUMNS; v++) sum[r][v] += e[v] * k_i;
                }
            }
            UNROLL for (int r = 0; r < ROWS; r++) {
                REAL *at = NTH(S, (i + r) * C + c);
                UNROLL for (int v = 0; v < COLUMNS; v++) ST(NTH(at, v), LD(NTH(at, v)) + sum[r][v]);
            }
        }
    }
}

INLINE void NAME(lanes_forward)(int D, const Job *job, NAME(lanes) *work, int64_t first) {
    const int64_t all = job->B * job->H * D * C_OF(D, D);
    REAL *checkpoints = (REAL *)job->checkpoints;
    NAME(lanes_load)(D, job, work, first);
    NAME(load_matrices)(D, work, (const REAL *)job->shift, work->S);
    for (int64_t begin = 0, end; begin < job->T; begin = end) {
        end = begin + CHUNK < job->T ? begin + CHUNK : job->T;
        if (begin && checkpoints) NAME(store_matrices)(D, work, work->S, checkpoints + (begin / CHUNK - 1) * all);
        NAME(lanes_span)(D, job, work, begin, end, 0);
        NAME(lanes_add_edits)(D, work->edits, (int)(end - begin), work->S);
    }
    NAME(store_matrices)(D, work, work->S, (REAL *)job->final);
}

/* ---- backward ---- */

/* The gradient of the logits of p = softmax(.), for the gradient g = g - minus (NULL: 0): out = p * (g - p . g) */
INLINE void NAME(lanes_softmax_backward)(int D, const REAL *p, const REAL *g, const REAL *minus, REAL *out) {
    vec dot = ZERO;
    for (int i = 0; i < D; i++) {
        vec g_i = LD(NTH(g, i));
        if (minus) g_i -= LD(NTH(minus, i));
        ST(NTH(out, i), g_i);
        dot += LD(NTH(p, i)) * g_i;
    }
    for (int i = 0; i < D; i++) ST(NTH(out, i), LD(NTH(p, i)) * (LD(NTH(out, i)) - dot));
}

/* gd = ge * rate; out = the gradient of the rates' logits */
INLINE void NAME(lanes_rates_backward)(int D, const REAL *rates, const REAL *e, const REAL *ge, REAL *gd, REAL *out) {
    for (int g = 0; g < 4; g++) {
        const vec rate = LD(NTH(rates, g));
        vec sum = ZERO;
        for (int c = g * D; c < (g < 3 ? (g + 1) * D : C_OF(D, D)); c++) {
            const vec ge_c = LD(NTH(ge, c));
            ST(NTH(gd, c), ge_c * rate);
            sum += ge_c * LD(NTH(e, c));
        }
        ST(NTH(out, g), sum * (1 - rate));
    }
}

/* W -= k (outer) e if `edited`; out = W a */
INLINE void NAME(lanes_undo_edit)(int D, int edited, const REAL *k, const REAL *e, REAL *W, const REAL *a, REAL *out) {
    const int C = C_OF(D, D);
    for (int i = 0; i < D; i += 4, W = NTH(W, 4 * C)) {
        vec sum[4], k_i[4];
        UNROLL for (int r = 0; r < 4; r++) sum[r] = ZERO, k_i[r] = LD(NTH(k, i + r));
        for (int c = 0; c < C; c++) {
            const vec e_c = LD(NTH(e, c)), a_c = LD(NTH(a, c));
            UNROLL for (int r = 0; r < 4; r++) {
                vec w = LD(NTH(W, r * C + c));
                if (edited) {
                    w -= e_c * k_i[r];
                    ST(NTH(W, r * C + c), w);
                }
                sum[r] += w * a_c;
            }
        }
        UNROLL for (int r = 0; r < 4; r++) ST(NTH(out, i + r), sum[r]);
    }
}

/* If `edited`: G += u (outer) gd + x (outer) gr; gx = W gr. If `earlier`: gk = G e, ge = k G, for the step before, whose
 * recorded edit is k. */
INLINE void NAME(lanes_edit_backward)(int D, const NAME(lanes) *work, int edited, const REAL *u, const REAL *x,
                                  int earlier, const REAL *k) {
    const int C = C_OF(D, D);
    REAL *G = work->G, *ge = work->ge; /* copies: a store might alias work's pointers */
    const REAL *W = work->W, *gd = work->gd, *gr = work->gr, *e = earlier ? NTH(k, D) : 0;
    for (int i = 0; i < D; i += ROWS, G = NTH(G, ROWS * C)) {
        vec gx[ROWS], gk[ROWS], u_i[ROWS], x_i[ROWS], k_i[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) {
            gx[r] = gk[r] = ZERO;
            if (edited) u_i[r] = LD(NTH(u, i + r)), x_i[r] = LD(NTH(x, i + r));
            if (earlier) k_i[r] = LD(NTH(k, i + r));
        }
        for (int c = 0; c < C; c++) {
            vec gd_c = ZERO, gr_c = ZERO, e_c = ZERO, ge_c = ZERO;
            if (edited) gd_c = LD(NTH(gd, c)), gr_c = LD(NTH(gr, c));
            if (earlier) {
                e_c = LD(NTH(e, c));
                if (i) ge_c = LD(NTH(ge, c));
            }
            UNROLL for (int r = 0; r < ROWS; r++) {
                vec g = LD(NTH(G, r * C + c));
                if (edited) {
                    g += gd_c * u_i[r];
                    g += gr_c * x_i[r];
                    ST(NTH(G, r * C + c), g);
                    gx[r] += gr_c * LD(NTH(W, (i + r) * C + c));
                }
                if (earlier) {
                    gk[r] += g * e_c;
                    ge_c += g * k_i[r];
                }
            }
            if (earlier) ST(NTH(ge, c), ge_c);
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            if (edited) ST(NTH(work->gx, i + r), gx[r]);
            if (earlier) ST(NTH(work->gk, i + r), gk[r]);
        }
    }
}

/* A += G and G = 0 in the lanes in which an episode starts */
INLINE void NAME(lanes_reset_gradient)(int D, const NAME(lanes) *work, ivec where) {
    for (int i = 0; i < D * C_OF(D, D); i++) {
        REAL *A = NTH(work->A, i), *G = NTH(work->G, i);
        ST(A, SELECT(where, LD(A) + LD(G), LD(A)));
        ST(G, SELECT(where, ZERO, LD(G)));
    }
}

/* Backward through steps [begin, end), one chunk; work->S is its first shift. */
INLINE void NAME(lanes_span_backward)(int D, const Job *job, const NAME(lanes) *work, int64_t begin, int64_t end) {
    const int64_t pairs = job->B * job->H;
    const int size = D * C_OF(D, D);
    const REAL *kept = NAME(lanes_span)(D, job, work, begin, end, 1);
    NAME(lanes_edit_backward)(D, work, 0, 0, 0, 1, NTH(work->edits, (end - 1 - begin) * EDIT_SIZE(D)));
    for (int64_t t = end - 1; t >= begin; t--) {
        const REAL *k = NTH(work->edits, (t - begin) * EDIT_SIZE(D)), *e = NTH(k, D);
        const REAL *q = NTH(work->gates, (t - begin) * GATES_SIZE(D)), *u = NTH(q, D), *x = NTH(u, D);
        const REAL *earlier = k - EDIT_SIZE(D) * VLEN;
        const int64_t at = (t * pairs + work->first) * D;
        ivec where;
        NAME(lanes_rates_backward)(D, NTH(x, D), e, work->ge, work->gd, NTH(work->gr, 3 * D));
        if (t + 1 < end)
            NAME(lanes_undo_edit)(D, 1, k, e, work->W, work->gd, work->gu);
        else
            NAME(lanes_undo_edit)(D, 0, k, e, work->W, work->gd, work->gu);
        if (job->grad_y) NAME(load_row)(work, D, (const REAL *)job->grad_y + at, work->gr);
        NAME(lanes_softmax_backward)(D, q, work->gu, 0, NTH(work->gr, D));
        NAME(lanes_softmax_backward)(D, k, work->gk, work->gu, NTH(work->gr, 2 * D));
        const int starts = NAME(lanes_starting)(job, work, t, &where);
        if (starts || t == begin) {
            NAME(lanes_edit_backward)(D, work, 1, u, x, 0, 0);
            if (starts) NAME(lanes_reset_gradient)(D, work, where);
            if (starts && t > begin) {
                kept -= (size_t)size * VLEN;
                NAME(assign_where)(size, where, kept, work->W);
                NAME(lanes_edit_backward)(D, work, 0, 0, 0, 1, earlier);
            }
        } else {
            NAME(lanes_edit_backward)(D, work, 1, u, x, 1, earlier);
        }
        NAME(store_row)(work, D, work->gx, (REAL *)job->grad_x + at);
    }
}

INLINE void NAME(lanes_backward)(int D, const Job *job, NAME(lanes) *work, int64_t first) {
    const int size = D * C_OF(D, D);
    const int64_t all = job->B * job->H * size;
    NAME(lanes_load)(D, job, work, first);
    NAME(load_matrices)(D, work, (const REAL *)job->grad_final, work->G); /* final shift = W - slow */
    for (int i = 0; i < size; i++) ST(NTH(work->A, i), -LD(NTH(work->G, i)));
    if (!job->grad_y) memset(work->gr, 0, (size_t)D * VLEN * sizeof(REAL));
    for (int64_t end = job->T, begin; end > 0; end = begin) {
        const int64_t chunk = (end - 1) / CHUNK;
        begin = chunk * CHUNK;
        const REAL *shift = begin ? (const REAL *)job->checkpoints + (chunk - 1) * all : (const REAL *)job->shift;
        NAME(load_matrices)(D, work, shift, work->S);
        NAME(lanes_span_backward)(D, job, work, begin, end);
    }
    /* G is 0 in lanes in which an episode starts at the first step. */
    for (int i = 0; i < size; i++) ST(NTH(work->A, i), LD(NTH(work->A, i)) + LD(NTH(work->G, i)));
    NAME(store_matrices)(D, work, work->A, (REAL *)job->grad_weight);
    if (job->grad_shift) NAME(store_matrices)(D, work, work->G, (REAL *)job->grad_shift);
}

/* ---- a thread's work ---- */

/* Constant head sizes: loops of known length */
#define LANES_FUNCTION(name, D)                                                                        \
    static NOINLINE TARGET void NAME(name##_##D)(const Job *job, NAME(lanes) *work, int64_t first) {   \
        NAME(name)(D, job, work, first);                                                               \
    }
LANES_FUNCTION(lanes_forward, 4)
LANES_FUNCTION(lanes_forward, 8)
LANES_FUNCTION(lanes_backward, 4)
LANES_FUNCTION(lanes_backward, 8)

/* Run groups of VLEN pairs until none is left. */
static TARGET void NAME(lanes_worker)(void *data) {
    Job *job = (Job *)data;
    void (*run)(const Job *, NAME(lanes) *, int64_t) =
        job->D == 4 ? (job->grad_x ? NAME(lanes_backward_4) : NAME(lanes_forward_4))
                    : (job->grad_x ? NAME(lanes_backward_8) : NAME(lanes_forward_8));
    const int64_t groups = (job->B * job->H + VLEN - 1) / VLEN;
    NAME(lanes) work;
    if (!NAME(lanes_new)(&work, (int)job->D, job->grad_x != 0)) {
        job->failed = 1;
        return;
    }
    for (int64_t from; (from = TAKE(job)) < groups;) {
        for (int64_t group = from; group < from + job->grain && group < groups; group++)
            run(job, &work, group * VLEN);
    }
    free(work.block);
}
