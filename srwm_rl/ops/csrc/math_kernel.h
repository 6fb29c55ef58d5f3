/* Arithmetic on vectors and on a head's padded matrix, for one number type and vector width; see simd.h and kernels.h. */

#if VLEN > 1
typedef REAL NAME(number_vec) __attribute__((vector_size(VLEN * sizeof(REAL)), may_alias));
typedef REAL NAME(unaligned_vec) __attribute__((vector_size(VLEN * sizeof(REAL)), may_alias, aligned(sizeof(REAL))));
typedef IREAL NAME(integer_vec) __attribute__((vector_size(VLEN * sizeof(REAL)), may_alias));
#else
typedef REAL NAME(number_vec);
typedef REAL NAME(unaligned_vec);
typedef int NAME(integer_vec);
#endif

/* mask ? x : y, by lane */
INLINE vec NAME(select)(ivec mask, vec x, vec y) {
#if VLEN == 1
    return mask ? x : y;
#else
    return (vec)(((ivec)x & mask) | ((ivec)y & ~mask));
#endif
}

/* ---- sums and maxima across lanes ---- */

/* out[0..3] = the sums of four vectors */
INLINE void NAME(sum4)(vec a, vec b, vec c, vec d, REAL *out) {
#if VLEN == 1
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
#else
    vec ab = FOLD_LO(a, b) + FOLD_HI(a, b), cd = FOLD_LO(c, d) + FOLD_HI(c, d);
    vec s = QUARTER_LO(ab, cd) + QUARTER_HI(ab, cd);
    REDUCE_REST(ADD, s);
    out[0] = s[0], out[1] = s[VLEN / 4], out[2] = s[VLEN / 2], out[3] = s[3 * VLEN / 4];
#endif
}

/* sum_a, sum_b = the sums of two vectors */
INLINE void NAME(sum2)(vec a, vec b, REAL *sum_a, REAL *sum_b) {
#if VLEN == 1
    *sum_a = a, *sum_b = b;
#else
    vec s = FOLD_LO(a, b) + FOLD_HI(a, b);
    s = QUARTER_LO(s, s) + QUARTER_HI(s, s);
    REDUCE_REST(ADD, s);
    *sum_a = s[0], *sum_b = s[VLEN / 4];
#endif
}

INLINE void NAME(max2)(vec a, vec b, REAL *max_a, REAL *max_b) {
#if VLEN == 1
    *max_a = a, *max_b = b;
#else
    vec m = VMAX(FOLD_LO(a, b), FOLD_HI(a, b));
    m = VMAX(QUARTER_LO(m, m), QUARTER_HI(m, m));
    REDUCE_REST(VMAX, m);
    *max_a = m[0], *max_b = m[VLEN / 4];
#endif
}

INLINE REAL NAME(sum)(vec a) {
    REAL sum, same;
    NAME(sum2)(a, a, &sum, &same);
    return sum;
}

/* a . b; n is a multiple of VLEN */
INLINE REAL NAME(dot)(int n, const REAL *a, const REAL *b) {
    vec s = ZERO;
    for (int c = 0; c < n; c += VLEN) s += LD(a + c) * LD(b + c);
    return NAME(sum)(s);
}

/* One array of a thread's memory. */
typedef struct {
    REAL **at;
    size_t size;
} NAME(part);

/* Allocate arrays of zeros, each aligned to 64 bytes; return the block to free, or NULL without memory. */
static void *NAME(allocate)(const NAME(part) *parts, size_t count) {
    size_t total = 64 / sizeof(REAL);
    for (size_t i = 0; i < count; i++) total += ROUND(parts[i].size, 16);
    void *block = calloc(total, sizeof(REAL));
    if (!block) return 0;
    REAL *at = (REAL *)ALIGN(block);
    for (size_t i = 0; i < count; i++) {
        *parts[i].at = at;
        at += ROUND(parts[i].size, 16);
    }
    return block;
}

/* ---- exponentials ---- */

/* exp(x) for x <= 0; NaN for NaN */
INLINE vec NAME(exp)(vec x) {
#if VLEN == 1
    return EXP1(x);
#elif IS_DOUBLE
    vec out = x;
    for (int i = 0; i < VLEN; i++) out[i] = exp(x[i]);
    return out;
#else
    /* 2^n * p(x - n log 2), the polynomial of Cephes' expf. Adding 1.5 * 2^23 rounds n to an integer in the lowest bits. */
    vec magic = x * 1.44269504088896341f + 12582912.0f, n = magic - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec bits = (ivec)p + (((ivec)magic) << 23);
    /* 0 below -87, where 2^n is denormal. NaN is restored: adding n to its bits could give a number. */
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
    vec even[8], odd[8]; /* two chains hide the multiply-add's latency */
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

/* to = from + k (outer) e; out = a to */
INLINE void NAME(edit_read_block)(int D, int P, int nb, const REAL *from, REAL *to, const REAL *k, const REAL *e,
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

INLINE void NAME(edit_read)(int D, int P, const REAL *from, REAL *to, const REAL *k, const REAL *e, const REAL *a,
                             REAL *out) {
#define CALL(nb) NAME(edit_read_block)(D, P, nb, from + c, to + c, k, e + c, a, out + c)
    BLOCKS(8, P, CALL);
#undef CALL
}

#define EDIT_BLOCK (VLEN == 16 ? 4 : 2) /* vectors of a row; four rows of them fit the registers */

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
