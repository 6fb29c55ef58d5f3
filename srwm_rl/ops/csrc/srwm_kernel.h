/* The SRWM recurrence for one number type and one vector width; srwm_cpu.c includes this once for each pair, and it
 * includes the delta rule, which shares its tools.
 *
 * Set before inclusion: REAL, VLEN (numbers per vector, 1: plain C), NAME(x), TARGET (function attribute), VMAX(a, b).
 * The algorithm, its backward pass and the checkpoint scheme are derived in ../README.md; names follow it.
 *
 * Layout: a head's W is [DR][P], rows of C = E+2D+4 columns (y: E, q and k: D each, beta: 4) padded with zeros to P
 * (whole vectors), and DR rows (D padded with zeros to a multiple of 4). The columns of a row lie together, so that
 * `a W` needs no sum across a vector's lanes.
 */

#define INLINE static inline ALWAYS_INLINE TARGET

#if VLEN > 1
typedef REAL NAME(vec) __attribute__((vector_size(VLEN * sizeof(REAL)), may_alias));
typedef REAL NAME(uvec) __attribute__((vector_size(VLEN * sizeof(REAL)), may_alias, aligned(sizeof(REAL))));
typedef IREAL NAME(ivec) __attribute__((vector_size(VLEN * sizeof(REAL)), may_alias));
#else
typedef REAL NAME(vec);
typedef REAL NAME(uvec);
#endif
#define vec NAME(vec)
#define ivec NAME(ivec)
#define LD(p) (*(const vec *)(p))
#define ST(p, v) (*(vec *)(p) = (v))
#define LDU(p) (*(const NAME(uvec) *)(p))
#define STU(p, v) (*(NAME(uvec) *)(p) = (v))
#define ZERO ((vec){0})

/* ---- lanes ---- */

#if VLEN == 16
#define FOLD_LO(a, b) SHUF(ivec, a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define FOLD_HI(a, b) SHUF(ivec, a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define QUARTER_LO(a, b) SHUF(ivec, a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define QUARTER_HI(a, b) SHUF(ivec, a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#define SWAP2(a) SHUF(ivec, a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP1(a) SHUF(ivec, a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#elif VLEN == 8
#define FOLD_LO(a, b) SHUF(ivec, a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define FOLD_HI(a, b) SHUF(ivec, a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#define QUARTER_LO(a, b) SHUF(ivec, a, b, 0, 1, 4, 5, 8, 9, 12, 13)
#define QUARTER_HI(a, b) SHUF(ivec, a, b, 2, 3, 6, 7, 10, 11, 14, 15)
#define SWAP1(a) SHUF(ivec, a, a, 1, 0, 3, 2, 5, 4, 7, 6)
#elif VLEN == 4
#define FOLD_LO(a, b) SHUF(ivec, a, b, 0, 1, 4, 5)
#define FOLD_HI(a, b) SHUF(ivec, a, b, 2, 3, 6, 7)
#define QUARTER_LO(a, b) SHUF(ivec, a, b, 0, 2, 4, 6)
#define QUARTER_HI(a, b) SHUF(ivec, a, b, 1, 3, 5, 7)
#endif

/* Write the sums of four vectors to out[0..3]. */
INLINE void NAME(sum4)(vec a, vec b, vec c, vec d, REAL *out) {
#if VLEN == 1
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
#else
    vec ab = FOLD_LO(a, b) + FOLD_HI(a, b), cd = FOLD_LO(c, d) + FOLD_HI(c, d);
    vec s = QUARTER_LO(ab, cd) + QUARTER_HI(ab, cd);
#if VLEN == 16
    s += SWAP2(s);
#endif
#if VLEN >= 8
    s += SWAP1(s);
#endif
    out[0] = s[0], out[1] = s[VLEN / 4], out[2] = s[VLEN / 2], out[3] = s[3 * VLEN / 4];
#endif
}

/* Return in [0] and [1] the sums (or maxima) of two vectors. */
#if VLEN == 1
#define REDUCE2(op, a, b, ra, rb) (ra = (a), rb = (b))
#else
#if VLEN == 16
#define REDUCE_LAST(op, s) (s = op(s, SWAP2(s)), s = op(s, SWAP1(s)))
#elif VLEN == 8
#define REDUCE_LAST(op, s) (s = op(s, SWAP1(s)))
#else
#define REDUCE_LAST(op, s) ((void)0)
#endif
#define REDUCE2(op, a, b, ra, rb)                                    \
    do {                                                             \
        vec fold_ = op(FOLD_LO(a, b), FOLD_HI(a, b));                \
        fold_ = op(QUARTER_LO(fold_, fold_), QUARTER_HI(fold_, fold_)); \
        REDUCE_LAST(op, fold_);                                      \
        ra = fold_[0], rb = fold_[VLEN / 4];                         \
    } while (0)
#endif
#define ADD(a, b) ((a) + (b))

/* exp of x <= 0; not a number stays not a number. */
INLINE vec NAME(exp)(vec x) {
#if VLEN == 1
    return EXP1(x);
#elif defined(REAL_IS_DOUBLE)
    vec out = x;
    for (int i = 0; i < VLEN; i++) out[i] = exp(x[i]);
    return out;
#else
    /* 2^n * p(x - n log 2), Cephes' expf: 1.5 * 2^23 rounds to an integer that then sits in the lowest bits. */
    vec magic = x * 1.44269504088896341f + 12582912.0f, n = magic - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits = (ivec)p + (((ivec)magic) << 23);
    /* Below -87, 2^n would leave the normal numbers; adding n to the bits of some NaN would make a number of it. */
    return (vec)((bits & ~(ivec)(x < -87.0f)) | ~(ivec)(x == x));
#endif
}

/* Return sigmoid(x). */
INLINE vec NAME(sigmoid)(vec x) {
#if VLEN == 1
    REAL e = EXP1(x < 0 ? x : -x);
    return (x < 0 ? e : 1) / (1 + e);
#else
    ivec negative = (ivec)(x < 0);
    vec e = NAME(exp)((vec)((negative & (ivec)x) | (~negative & (ivec)(-x))));
    vec one = e * 0 + 1;
    return (vec)((negative & (ivec)e) | (~negative & (ivec)one)) / (1 + e);
#endif
}

/* ---- matrix times vector, by blocks of up to 8 column vectors held in registers ---- */

#define BLOCKS(MAX, P, CALL)                \
    do {                                    \
        int c = 0, left = (P) / VLEN;       \
        for (; left > MAX; left -= MAX) {   \
            CALL(MAX);                      \
            c += MAX * VLEN;                \
        }                                   \
        switch (left) {                     \
            case 8: CALL(8); break;         \
            case 7: CALL(7); break;         \
            case 6: CALL(6); break;         \
            case 5: CALL(5); break;         \
            case 4: CALL(4); break;         \
            case 3: CALL(3); break;         \
            case 2: CALL(2); break;         \
            case 1: CALL(1); break;         \
        }                                   \
    } while (0)

/* out = a W, times `scale` by column where given */
INLINE void NAME(read_block)(int D, int P, int nb, const REAL *W, const REAL *a, const REAL *scale, REAL *out) {
    vec even[8], odd[8]; /* two chains: a multiply-add takes four cycles */
    UNROLL for (int v = 0; v < nb; v++) even[v] = odd[v] = ZERO;
    int i = 0;
    for (; i + 1 < D; i += 2) {
        const REAL *row = W + (size_t)i * P;
        UNROLL for (int v = 0; v < nb; v++) even[v] += LD(row + v * VLEN) * a[i];
        UNROLL for (int v = 0; v < nb; v++) odd[v] += LD(row + P + v * VLEN) * a[i + 1];
    }
    if (i < D) {
        UNROLL for (int v = 0; v < nb; v++) odd[v] += LD(W + (size_t)i * P + v * VLEN) * a[i];
    }
    UNROLL for (int v = 0; v < nb; v++) {
        vec s = even[v] + odd[v];
        if (scale) s *= LD(scale + v * VLEN);
        ST(out + v * VLEN, s);
    }
}

INLINE void NAME(read)(int D, int P, const REAL *W, const REAL *a, const REAL *scale, REAL *out) {
#define CALL(nb) NAME(read_block)(D, P, nb, W + c, a, scale ? scale + c : 0, out + c)
    BLOCKS(8, P, CALL);
#undef CALL
}

/* to = from + k (outer) e; then out = a to */
INLINE void NAME(write_read_block)(int D, int P, int nb, const REAL *from, REAL *to, const REAL *k, const REAL *e,
                                   const REAL *a, REAL *out) {
    vec sum[8], edit[8];
    UNROLL for (int v = 0; v < nb; v++) sum[v] = ZERO, edit[v] = LD(e + v * VLEN);
    for (int i = 0; i < D; i++) {
        size_t row = (size_t)i * P;
        UNROLL for (int v = 0; v < nb; v++) {
            vec w = LD(from + row + v * VLEN) + edit[v] * k[i];
            ST(to + row + v * VLEN, w);
            sum[v] += w * a[i];
        }
    }
    UNROLL for (int v = 0; v < nb; v++) ST(out + v * VLEN, sum[v]);
}

INLINE void NAME(write_read)(int D, int P, const REAL *from, REAL *to, const REAL *k, const REAL *e, const REAL *a,
                             REAL *out) {
#define CALL(nb) NAME(write_read_block)(D, P, nb, from + c, to + c, k, e + c, a, out + c)
    BLOCKS(8, P, CALL);
#undef CALL
}

#define EDIT_BLOCK (VLEN == 16 ? 4 : 2) /* x 4 rows: what the registers hold */

/* Four rows of the sum over `count` steps of k (outer) e: out[r] = sum k[i + r] e */
INLINE void NAME(edits_block)(int P, int nb, const REAL *steps, size_t step_size, int count, int i, size_t e_at,
                              REAL *out) {
    vec sum[4][8];
    UNROLL for (int r = 0; r < 4; r++) {
        UNROLL for (int v = 0; v < nb; v++) sum[r][v] = ZERO;
    }
    for (int t = 0; t < count; t++) {
        const REAL *k = steps + t * step_size + i, *e = steps + t * step_size + e_at;
        UNROLL for (int v = 0; v < nb; v++) {
            vec e_v = LD(e + v * VLEN);
            UNROLL for (int r = 0; r < 4; r++) sum[r][v] += e_v * k[r];
        }
    }
    UNROLL for (int r = 0; r < 4; r++) {
        UNROLL for (int v = 0; v < nb; v++) ST(out + r * P + v * VLEN, sum[r][v]);
    }
}

/* out[i] = W[i] . a for DR rows */
INLINE void NAME(row_dots)(int DR, int P, const REAL *W, const REAL *a, REAL *out) {
    for (int i = 0; i < DR; i += 4) {
        const REAL *row = W + (size_t)i * P;
        vec s[4] = {ZERO, ZERO, ZERO, ZERO};
        for (int c = 0; c < P; c += VLEN) {
            vec b = LD(a + c);
            UNROLL for (int r = 0; r < 4; r++) s[r] += b * LD(row + r * P + c);
        }
        NAME(sum4)(s[0], s[1], s[2], s[3], out + i);
    }
}

/* ---- a thread's memory ---- */

typedef struct {
    REAL *W;               /* forward: one matrix; backward: one for each step of a chunk */
    REAL *G;               /* backward: the gradient of W */
    REAL *steps;           /* records of steps: k, q, u [DQ each], then rates by column and e [P each] */
    REAL *r, *z;           /* x W of this step and x' W of the next */
    REAL *x;               /* the next step's input, padded */
    REAL *q_pad, *k_pad;   /* logits, padded with -inf */
    REAL *ge, *gd, *gr;    /* backward: gradients of e, d and r */
    REAL *gk, *gu, *gx;    /* backward: gradients of k, u and x */
    REAL *products;        /* ge * e */
    REAL *edits;           /* forward: four rows of a chunk's edits */
    REAL *slow, *S, *A;    /* held_kernel.h: the slow weight; a shift, backward one for each step and one more; its A */
    REAL *scales;          /* held_kernel.h: what each step's shift was multiplied with to meet the bound; 0: nothing */
    void *block;
} NAME(work);

#define ROUND(n, to) (((n) + (to) - 1) / (to) * (to))
#define DR_OF(D) ROUND(D, 4)
#define DQ_OF(D) ROUND(D, VLEN > 4 ? VLEN : 4)
#define C_OF(D, E) ((E) + 2 * (D) + 4)
#define P_OF(D, E) ROUND(C_OF(D, E), VLEN)
#define STEP_SIZE(D, E) ((size_t)ROUND(3 * DQ_OF(D) + 2 * P_OF(D, E), 16))

static TARGET int NAME(work_new)(NAME(work) *work, int D, int E, int backward, int held) {
    /* Every part gets 32 numbers of slack: a whole vector may be read or written from the last of its numbers on. */
    size_t dq = DQ_OF(D) + 32, p = P_OF(D, E) + 32, matrix = ROUND((size_t)DR_OF(D) * P_OF(D, E), 16);
    const struct {
        REAL **part;
        size_t size;
    } parts[] = {{&work->W, backward && !held ? CHUNK * matrix : matrix},
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
                 {&work->slow, held ? matrix : 0},
                 {&work->S, !held ? 0 : backward ? (CHUNK + 1) * matrix : matrix},
                 {&work->A, held && backward ? matrix : 0},
                 {&work->scales, held ? CHUNK : 0}};
    size_t count = sizeof(parts) / sizeof(parts[0]), total = 64 / sizeof(REAL);
    for (size_t i = 0; i < count; i++) total += ROUND(parts[i].size, 16);
    work->block = calloc(total, sizeof(REAL));
    if (!work->block) return 0;
    REAL *at = (REAL *)(((uintptr_t)work->block + 63) / 64 * 64);
    for (size_t i = 0; i < count; i++) {
        *parts[i].part = at;
        at += ROUND(parts[i].size, 16);
    }
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

/* Turn r = x W into the record's k, q, u = q - k and its rates by column. */
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
    REDUCE2(VMAX, q_vec, k_vec, q_max, k_max);
    q_vec = k_vec = ZERO;
    for (int c = 0; c < DQ; c += VLEN) {
        vec qe = NAME(exp)(LDU(q_in + c) - q_max), ke = NAME(exp)(LDU(k_in + c) - k_max);
        ST(q + c, qe), ST(k + c, ke);
        q_vec += qe, k_vec += ke;
    }
    REDUCE2(ADD, q_vec, k_vec, q_sum, k_sum);
    REAL q_scale = 1 / q_sum, k_scale = 1 / k_sum;
    for (int c = 0; c < DQ; c += VLEN) {
        vec qv = LD(q + c) * q_scale, kv = LD(k + c) * k_scale;
        ST(q + c, qv), ST(k + c, kv), ST(u + c, qv - kv);
    }
#if VLEN == 1
    REAL rate[4];
    for (int g = 0; g < 4; g++) rate[g] = NAME(sigmoid)(beta[g]);
#else
    vec rate = NAME(sigmoid)(LDU(beta)); /* lanes past the fourth: padding, harmless */
#endif
    NAME(fill)(rates, 0, E, rate[0]);
    NAME(fill)(rates, E, E + D, rate[1]);
    NAME(fill)(rates, E + D, E + 2 * D, rate[2]);
    NAME(fill)(rates, E + 2 * D, P, rate[3]);
}

INLINE REAL NAME(dot)(int n, const REAL *a, const REAL *b) {
    vec s = ZERO;
    for (int c = 0; c < n; c += VLEN) s += LD(a + c) * LD(b + c);
    REAL sum, again;
    REDUCE2(ADD, s, s, sum, again);
    (void)again;
    return sum;
}

/* Run steps [begin, end) of one chunk, no reset between them, from the matrix work->W on.
 *
 * Step i's matrix is work->W + i * slot (slot 0: in place), its record work->steps + i * STEP_SIZE. The next step's x' W
 * is taken from W before the step's edit and corrected by (x' . k) e, so that the edit of W and the softmax overlap.
 * The last edit is left in its record.
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
            const REAL *before = step - STEP_SIZE(D, E);
            NAME(write_read)(D, P, W, W + slot, before, before + 3 * DQ + P, next, work->z);
            W += slot;
        } else if (t + 1 < end) {
            NAME(read)(D, P, W, next, 0, work->z);
        }
        NAME(read)(D, P, W, u, rates, e);
        if (t + 1 < end) {
            memcpy(work->x, next, D * sizeof(REAL));
            REAL again = NAME(dot)(DQ, work->x, k);
            for (int c = 0; c < P; c += VLEN) ST(work->r + c, LD(work->z + c) + LD(e + c) * again);
        }
    }
}

/* to = from (NULL: zeros) + the edits of the `count` steps on record, without padding */
INLINE void NAME(add_edits)(int D, int E, const NAME(work) *work, int count, const REAL *from, REAL *to) {
    const int C = C_OF(D, E), P = P_OF(D, E);
    if (count == 1 && from) { /* acting: nothing to sum */
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

/* work->W = slow + shift (or slow alone), padded */
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

INLINE int NAME(starts_at)(const Job *job, int64_t t, int64_t batch) {
    return job->starts && job->starts[t * job->B + batch];
}

INLINE void NAME(forward_pair)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair) {
    const int64_t batch = pair / job->H, pairs = job->B * job->H, size = (int64_t)D * C_OF(D, E);
    const REAL *slow = (const REAL *)job->weight + pair % job->H * size;
    const REAL *shift = job->shift ? (const REAL *)job->shift + pair * size : 0;
    REAL *final = (REAL *)job->final + pair * size, *y = (REAL *)job->y, *checkpoints = (REAL *)job->checkpoints;

    /* `final` holds the shift as it grows. It gets each span's edits at once, apart from W, so that edits too small to
     * show in W are not lost. */
    for (int64_t begin = 0, end; begin < job->T; begin = end) {
        int64_t chunk = begin / CHUNK, stop = (chunk + 1) * CHUNK < job->T ? (chunk + 1) * CHUNK : job->T;
        if (begin % CHUNK == 0 && begin && checkpoints)
            memcpy(checkpoints + ((chunk - 1) * pairs + pair) * size, final, size * sizeof(REAL));
        for (end = begin + 1; end < stop && !NAME(starts_at)(job, end, batch);) end++;
        const REAL *from = NAME(starts_at)(job, begin, batch) ? 0 : begin ? final : shift;
        NAME(pad)(D, E, work->W, slow, from);
        NAME(span)(D, E, job, work, pair, begin, end, 0, y);
        NAME(add_edits)(D, E, work, (int)(end - begin), from, final);
    }
}

/* ---- backward ---- */

/* From the gradients of softmax outputs to those of their logits: out = p * (g - p . g), twice. */
INLINE void NAME(softmax_backward)(int DQ, const REAL *q, const REAL *gq, REAL *q_out, const REAL *k, const REAL *gk,
                                   REAL *k_out) {
    vec q_sum = ZERO, k_sum = ZERO;
    for (int c = 0; c < DQ; c += VLEN) q_sum += LD(q + c) * LD(gq + c), k_sum += LD(k + c) * (LD(gk + c) - LD(gq + c));
    REAL q_dot, k_dot;
    REDUCE2(ADD, q_sum, k_sum, q_dot, k_dot);
    for (int c = 0; c < DQ; c += VLEN) STU(q_out + c, LD(q + c) * (LD(gq + c) - q_dot));
    for (int c = 0; c < DQ; c += VLEN) STU(k_out + c, LD(k + c) * (LD(gk + c) - LD(gq + c) - k_dot));
}

/* The sum of n numbers from anywhere. */
INLINE REAL NAME(sum)(int n, const REAL *a) {
    vec s = ZERO;
    int c = 0;
    for (; c + VLEN <= n; c += VLEN) s += LDU(a + c);
    REAL sum = 0, whole, again;
    for (; c < n; c++) sum += a[c];
    REDUCE2(ADD, s, s, whole, again);
    (void)again;
    return sum + whole;
}

/* Write the gradient of r = x W (y | q | k | beta), zero in the padding, to work->gr. */
INLINE void NAME(gates_backward)(int D, int E, const NAME(work) *work, const REAL *step, const REAL *grad_y) {
    const int DQ = DQ_OF(D), P = P_OF(D, E);
    const REAL *k = step, *q = k + DQ, *rates = q + 2 * DQ, *e = rates + P;
    REAL *gr = work->gr, *products = work->products, sums[4];
    /* In this order: each whole-vector write spills zeros over what the next one fills. */
    if (grad_y) memcpy(gr, grad_y, E * sizeof(REAL));
    NAME(softmax_backward)(DQ, q, work->gu, gr + E, k, work->gk, gr + E + D);
    for (int c = 0; c < P; c += VLEN) ST(products + c, LD(work->ge + c) * LD(e + c));
    if (D % VLEN == 0 && E % VLEN == 0 && VLEN > 1) {
        vec s[4] = {ZERO, ZERO, ZERO, LD(products + E + 2 * D)};
        for (int c = 0; c < E; c += VLEN) s[0] += LD(products + c);
        for (int c = 0; c < D; c += VLEN) s[1] += LD(products + E + c), s[2] += LD(products + E + D + c);
        NAME(sum4)(s[0], s[1], s[2], s[3], sums);
    } else {
        sums[0] = NAME(sum)(E, products);
        for (int g = 1; g < 3; g++) sums[g] = NAME(sum)(D, products + E + (g - 1) * D);
    }
    const REAL *last = products + E + 2 * D;
    sums[3] = last[0] + last[1] + last[2] + last[3];
    for (int g = 0; g < 4; g++) gr[E + 2 * D + g] = sums[g] * (1 - rates[g ? E + (g - 1) * D : 0]);
}

/* Four rows: G += u (outer) gd + x (outer) gr; gx = W gr; then for the step before: gk = G e, ge += k G. */
INLINE void NAME(pull_back)(int D, int E, const NAME(work) *work, const REAL *W, const REAL *u, const REAL *earlier) {
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

/* The gradient of the output at `at`, a step and pair, or NULL: zeros. */
INLINE const REAL *NAME(grad_y_at)(int E, const Job *job, int64_t at) {
    return job->grad_y ? (const REAL *)job->grad_y + at * E : 0;
}

/* Go back from `end` to `begin`, a span without resets inside one chunk; work->W holds its first matrix. */
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
            NAME(pull_back)(D, E, work, W, step + 2 * DQ, step - STEP_SIZE(D, E));
        else
            NAME(pull_back)(D, E, work, W, step + 2 * DQ, 0);
        memcpy((REAL *)job->grad_x + at, work->gx, D * sizeof(REAL));
    }
}

/* grad_weight += G without its padding, and G = 0 where an episode begins */
INLINE void NAME(collect)(int D, int E, REAL *G, REAL *grad_weight, REAL *grad_shift, int starts) {
    const int C = C_OF(D, E), P = P_OF(D, E);
    for (int i = 0; i < D; i++, G += P) {
        for (int c = 0; c < C; c++) grad_weight[i * C + c] += G[c];
        if (starts) memset(G, 0, P * sizeof(REAL));
        if (grad_shift) memcpy(grad_shift + i * C, G, C * sizeof(REAL));
    }
}

INLINE void NAME(backward_pair)(int D, int E, const Job *job, const NAME(work) *work, int64_t pair) {
    const int C = C_OF(D, E), P = P_OF(D, E);
    const int64_t batch = pair / job->H, pairs = job->B * job->H, size = (int64_t)D * C;
    const REAL *slow = (const REAL *)job->weight + pair % job->H * size;
    const REAL *shift = job->shift ? (const REAL *)job->shift + pair * size : 0;
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
        int64_t chunk = (end - 1) / CHUNK;
        int starts;
        for (begin = end - 1; !(starts = NAME(starts_at)(job, begin, batch)) && begin > chunk * CHUNK;) begin--;
        const REAL *checkpoint = begin ? (const REAL *)job->checkpoints + ((chunk - 1) * pairs + pair) * size : shift;
        NAME(pad)(D, E, work->W, slow, starts ? 0 : checkpoint);
        NAME(span_backward)(D, E, job, work, pair, begin, end);
        if (starts || !begin) NAME(collect)(D, E, work->G, grad_weight, begin ? 0 : grad_shift, starts);
    }
}

/* ---- acting: one step of heads of size 8 ---- */

#if VLEN == 16 && !defined(REAL_IS_DOUBLE)
/* Small heads act in the small networks of vector observations, where a step's time is theirs. All of a matrix stays in
 * registers: a row of 28 is the vectors [y | q] and, from column 12 on, [the end of q | k | beta]. Where the two
 * overlap, both find the same. */
static NOINLINE TARGET void NAME(step_8)(const Job *job, const NAME(work) *work, int64_t pair) {
    enum { D = 8, C = 28, SECOND = 12 };
    const REAL *slow = (const REAL *)job->weight + pair % job->H * D * C, *x = (const REAL *)job->x + pair * D;
    const REAL *shift = job->shift && !NAME(starts_at)(job, 0, pair / job->H) ? (const REAL *)job->shift + pair * D * C : 0;
    REAL *final = (REAL *)job->final + pair * D * C;
    vec first[D], second[D], y_q[2] = {ZERO, ZERO}, q_k_beta[2] = {ZERO, ZERO};
    UNROLL for (int i = 0; i < D; i++) {
        first[i] = LDU(slow + i * C), second[i] = LDU(slow + i * C + SECOND);
        if (shift) first[i] += LDU(shift + i * C), second[i] += LDU(shift + i * C + SECOND);
        y_q[i % 2] += first[i] * x[i], q_k_beta[i % 2] += second[i] * x[i];
    }
    y_q[0] += y_q[1], q_k_beta[0] += q_k_beta[1];
    memcpy((REAL *)job->y + pair * D, y_q, D * sizeof(REAL));

#define EIGHTS(op, v)                                                                               \
    v = op(v, SHUF(ivec, v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)),              \
    v = op(v, SHUF(ivec, v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)),              \
    v = op(v, SHUF(ivec, v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))
    vec p = SHUF(ivec, y_q[0], q_k_beta[0], 8, 9, 10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24, 25, 26, 27), most = p;
    EIGHTS(VMAX, most);
    p = NAME(exp)(p - most);
    vec sum = p;
    EIGHTS(ADD, sum);
    p /= sum; /* [q | k] */
#undef EIGHTS
    ALIGNED REAL u[16], q_and_k[16];
    ST(u, p - SHUF(ivec, p, p, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    ST(q_and_k, p);
    const vec rate = NAME(sigmoid)(q_k_beta[0]);

    vec edit_first[2] = {ZERO, ZERO}, edit_second[2] = {ZERO, ZERO};
    UNROLL for (int i = 0; i < D; i++) edit_first[i % 2] += first[i] * u[i], edit_second[i % 2] += second[i] * u[i];
    const vec rates[2] = {SHUF(ivec, rate, rate, 12, 12, 12, 12, 12, 12, 12, 12, 13, 13, 13, 13, 13, 13, 13, 13),
                          SHUF(ivec, rate, rate, 13, 13, 13, 13, 14, 14, 14, 14, 14, 14, 14, 14, 15, 15, 15, 15)};
    const vec e_first = (edit_first[0] + edit_first[1]) * rates[0], e_second = (edit_second[0] + edit_second[1]) * rates[1];
    UNROLL for (int i = 0; i < D; i++) {
        const REAL k = q_and_k[D + i];
        STU(final + i * C, (shift ? LDU(shift + i * C) : ZERO) + e_first * k);
        STU(final + i * C + SECOND, (shift ? LDU(shift + i * C + SECOND) : ZERO) + e_second * k);
    }
    (void)work;
}
#endif

#include "delta_kernel.h"
#include "held_kernel.h"

/* ---- a thread's share ---- */

/* A function for each recurrence, direction and head size: in one, the compiler runs out of registers. Common sizes get
 * loops of known length. */
#define FUNCTION(name, kind, ...)                                                                        \
    static NOINLINE TARGET void NAME(name)(const Job *job, const NAME(work) *work, int64_t pair) {       \
        NAME(kind)(__VA_ARGS__, job, work, pair);                                                        \
    }
#define FUNCTIONS(n, D, E)                                \
    FUNCTION(forward_##n, forward_pair, D, E)             \
    FUNCTION(backward_##n, backward_pair, D, E)           \
    FUNCTION(delta_forward_##n, delta_forward_pair, D)    \
    FUNCTION(delta_backward_##n, delta_backward_pair, D)
#ifndef REAL_IS_DOUBLE
FUNCTIONS(8, 8, 8)
FUNCTIONS(16, 16, 16)
FUNCTIONS(32, 32, 32)
#endif
FUNCTIONS(any, (int)job->D, (int)job->E)
FUNCTION(held_forward_any, held_forward_pair, (int)job->D, (int)job->E)
FUNCTION(held_backward_any, held_backward_pair, (int)job->D, (int)job->E)

typedef void (*NAME(function))(const Job *, const NAME(work) *, int64_t);

static NAME(function) NAME(function_of)(const Job *job) {
#define CASE(n)                                                                                              \
    return job->value ? job->grad_x ? NAME(delta_backward_##n) : NAME(delta_forward_##n)                     \
                      : job->grad_x ? NAME(backward_##n) : NAME(forward_##n)
#if VLEN == 16 && !defined(REAL_IS_DOUBLE)
    if (STEP_8(job)) return NAME(step_8);
#endif
    if (HELD(job)) return job->grad_x ? NAME(held_backward_any) : NAME(held_forward_any);
    switch (job->value || job->E == job->D ? job->D : 0) {
#ifndef REAL_IS_DOUBLE
        case 8: CASE(8);
        case 16: CASE(16);
        case 32: CASE(32);
#endif
        default: CASE(any);
    }
#undef CASE
}

/* Take pairs until none is left. */
static TARGET void NAME(share)(void *data) {
    Job *job = (Job *)data;
    const NAME(function) run = NAME(function_of)(job);
    NAME(work) work;
    if (!NAME(work_new)(&work, (int)job->D, (int)(job->value ? job->D : job->E), job->grad_x != 0, HELD(job))) {
        job->failed = 1;
        return;
    }
    for (int64_t from; (from = TAKE(job)) < job->B * job->H;) {
        for (int64_t pair = from; pair < from + job->grain && pair < job->B * job->H; pair++) run(job, &work, pair);
    }
    free(work.block);
}

#ifndef REAL_IS_DOUBLE
#include "turn_kernel.h"
#if VLEN > 1
#include "lanes_kernel.h"
#endif
#include "tape_kernel.h"
#include "pool_kernel.h"
#endif

#undef FUNCTION
#undef FUNCTIONS
#undef INLINE
#undef vec
#undef ivec
#undef LD
#undef ST
#undef LDU
#undef STU
#undef ZERO
#undef FOLD_LO
#undef FOLD_HI
#undef QUARTER_LO
#undef QUARTER_HI
#undef SWAP2
#undef SWAP1
#undef ZIP_LO
#undef ZIP_HI
#undef WHERE
#undef SELECT
#undef REDUCE2
#undef REDUCE_LAST
#undef ADD
#undef BLOCKS
#undef EDIT_BLOCK
#undef ROUND
#undef DR_OF
#undef DQ_OF
#undef C_OF
#undef P_OF
#undef STEP_SIZE
#undef REAL
#undef IREAL
#undef EXP1
#undef VLEN
#undef NAME
#undef TARGET
#undef VMAX
#undef REAL_IS_DOUBLE
