/* Matrices turned by shuffling whole vectors, and the choice between two numbers; srwm_kernel.h includes this for single
 * precision, and lanes_kernel.h and tape_kernel.h use it.
 */

/* x where it is so, else 0 or y */
#if VLEN == 1
#define WHERE(so, x) ((so) ? (x) : 0)
#define SELECT(so, x, y) ((so) ? (x) : (y))
#else
#define WHERE(so, x) ((vec)((ivec)(x) & (ivec)(so)))
#define SELECT(so, x, y) ((vec)(((ivec)(x) & (ivec)(so)) | ((ivec)(y) & ~(ivec)(so))))
#endif

#if VLEN == 16
#define ZIP_LO(a, b) SHUF(ivec, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HI(a, b) SHUF(ivec, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VLEN == 8
#define ZIP_LO(a, b) SHUF(ivec, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HI(a, b) SHUF(ivec, a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#elif VLEN == 4
#define ZIP_LO(a, b) SHUF(ivec, a, b, 0, 4, 1, 5)
#define ZIP_HI(a, b) SHUF(ivec, a, b, 2, 6, 3, 7)
#else
#define ZIP_LO(a, b) (a)
#define ZIP_HI(a, b) (b)
#endif

/* Shuffle the two halves of n vectors together, as cards are, log2(rows) times: numbers [rows][m] turn to [m][rows]. */
INLINE void NAME(riffle)(int n, int rows, vec *a) {
    vec b[16];
    for (int times = 1; times < rows; times *= 2) {
        UNROLL for (int i = 0; i < n / 2; i++) {
            b[2 * i] = ZIP_LO(a[i], a[i + n / 2]);
            b[2 * i + 1] = ZIP_HI(a[i], a[i + n / 2]);
        }
        UNROLL for (int i = 0; i < n; i++) a[i] = b[i];
    }
}

/* to[j][i] = from[i][j] of a square of VLEN */
INLINE void NAME(turn_square)(const REAL *from, size_t from_step, REAL *to, size_t to_step) {
    vec a[VLEN];
    UNROLL for (int i = 0; i < VLEN; i++) a[i] = LDU(from + i * from_step);
    NAME(riffle)(VLEN, VLEN, a);
    UNROLL for (int i = 0; i < VLEN; i++) STU(to + i * to_step, a[i]);
}

/* to[j][i] = from[i][j] for i < n, j < m */
static TARGET void NAME(turn)(const REAL *from, size_t from_step, int n, int m, REAL *to, size_t to_step) {
    const int whole_n = n / VLEN * VLEN, whole_m = m / VLEN * VLEN;
    for (int i = 0; i < whole_n; i += VLEN) {
        for (int j = 0; j < whole_m; j += VLEN)
            NAME(turn_square)(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
    }
    for (int i = 0; i < n; i++) {
        for (int j = i < whole_n ? whole_m : 0; j < m; j++) to[j * to_step + i] = from[i * from_step + j];
    }
}
