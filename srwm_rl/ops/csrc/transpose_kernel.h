/* Transposes by shuffling whole vectors. */

/* Interleave the two halves of n vectors log2(rows) times: numbers [rows][m] become [m][rows]. */
INLINE void NAME(interleave)(int n, int rows, vec *a) {
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
INLINE void NAME(transpose_square)(const REAL *from, size_t from_step, REAL *to, size_t to_step) {
    vec a[VLEN];
    UNROLL for (int i = 0; i < VLEN; i++) a[i] = LDU(from + i * from_step);
    NAME(interleave)(VLEN, VLEN, a);
    UNROLL for (int i = 0; i < VLEN; i++) STU(to + i * to_step, a[i]);
}

/* to[j][i] = from[i][j] for i < n, j < m */
static TARGET void NAME(transpose)(const REAL *from, size_t from_step, int n, int m, REAL *to, size_t to_step) {
    const int whole_n = n / VLEN * VLEN, whole_m = m / VLEN * VLEN;
    for (int i = 0; i < whole_n; i += VLEN) {
        for (int j = 0; j < whole_m; j += VLEN)
            NAME(transpose_square)(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
    }
    for (int i = 0; i < n; i++) {
        for (int j = i < whole_n ? whole_m : 0; j < m; j++) to[j * to_step + i] = from[i * from_step + j];
    }
}
