/* Vector operations, as macros of the number type and vector width that the including file has set:
 *
 *   IS_DOUBLE   0: float, 1: double
 *   VLEN        numbers per vector; 1: plain C
 *   SUFFIX      appended to the name of every function and type: see NAME
 *   TARGET      the function attribute that selects the instruction set
 */

#define GLUE2(a, b) a##b
#define GLUE(a, b) GLUE2(a, b)
#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b) /* like GLUE, for names that expand to something with GLUE in it */
#define NAME(x) GLUE(x, SUFFIX)

#define REAL_0 float
#define REAL_1 double
#define REAL PASTE(REAL_, IS_DOUBLE)
#define IREAL_0 int32_t
#define IREAL_1 int64_t
#define IREAL PASTE(IREAL_, IS_DOUBLE)
#define EXP_0 expf
#define EXP_1 exp
#define EXP1 PASTE(EXP_, IS_DOUBLE)
#define SQRT_0 sqrtf
#define SQRT_1 sqrt
#define SQRT1 PASTE(SQRT_, IS_DOUBLE)

#define INLINE static inline ALWAYS_INLINE TARGET
#define vec NAME(number_vec)
#define ivec NAME(integer_vec) /* integers as wide as vec's numbers; what comparing two vec gives */
#define LD(p) (*(const vec *)(p))
#define ST(p, v) (*(vec *)(p) = (v))
#define LDU(p) (*(const NAME(unaligned_vec) *)(p)) /* unaligned */
#define STU(p, v) (*(NAME(unaligned_vec) *)(p) = (v))
#define ZERO ((vec){0})
#define ADD(a, b) ((a) + (b))
#define ROUND(n, to) (((n) + (to) - 1) / (to) * (to))

/* The larger of two numbers; NaN if the second one is. */
#define VMAX PASTE(VMAX, SUFFIX)
#define VMAX_f64(a, b) ((a) > (b) ? (a) : (b))
#if PORTABLE_VLEN == 1
#define VMAX_f32 VMAX_f64
#else
#define VMAX_f32(a, b) NAME(select)((ivec)((a) > (b)), a, b)
#endif
#define VMAX_f32_avx2(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define VMAX_f64_avx2(a, b) ((vec)_mm256_max_pd((__m256d)(a), (__m256d)(b)))
#define VMAX_f32_avx512(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))

/* Shuffles that halve the distance over which a sum across a vector's lanes is still to be taken. */
#define FOLD_LO(a, b) PASTE(FOLD_LO_, VLEN)(a, b)
#define FOLD_HI(a, b) PASTE(FOLD_HI_, VLEN)(a, b)
#define QUARTER_LO(a, b) PASTE(QUARTER_LO_, VLEN)(a, b)
#define QUARTER_HI(a, b) PASTE(QUARTER_HI_, VLEN)(a, b)
#define FOLD_LO_16(a, b) SHUF(ivec, a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define FOLD_HI_16(a, b) SHUF(ivec, a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define QUARTER_LO_16(a, b) SHUF(ivec, a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define QUARTER_HI_16(a, b) SHUF(ivec, a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#define SWAP2_16(a) SHUF(ivec, a, a, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP1_16(a) SHUF(ivec, a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define FOLD_LO_8(a, b) SHUF(ivec, a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define FOLD_HI_8(a, b) SHUF(ivec, a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#define QUARTER_LO_8(a, b) SHUF(ivec, a, b, 0, 1, 4, 5, 8, 9, 12, 13)
#define QUARTER_HI_8(a, b) SHUF(ivec, a, b, 2, 3, 6, 7, 10, 11, 14, 15)
#define SWAP1_8(a) SHUF(ivec, a, a, 1, 0, 3, 2, 5, 4, 7, 6)
#define FOLD_LO_4(a, b) SHUF(ivec, a, b, 0, 1, 4, 5)
#define FOLD_HI_4(a, b) SHUF(ivec, a, b, 2, 3, 6, 7)
#define QUARTER_LO_4(a, b) SHUF(ivec, a, b, 0, 2, 4, 6)
#define QUARTER_HI_4(a, b) SHUF(ivec, a, b, 1, 3, 5, 7)

/* v = the sums, or maxima, that FOLD and QUARTER have left to take */
#define REDUCE_REST(op, v) PASTE(REDUCE_REST_, VLEN)(op, v)
#define REDUCE_REST_16(op, v) (v = op(v, SWAP2_16(v)), v = op(v, SWAP1_16(v)))
#define REDUCE_REST_8(op, v) (v = op(v, SWAP1_8(v)))
#define REDUCE_REST_4(op, v) ((void)0)

/* Alternate the numbers of two vectors. */
#define ZIP_LO(a, b) PASTE(ZIP_LO_, VLEN)(a, b)
#define ZIP_HI(a, b) PASTE(ZIP_HI_, VLEN)(a, b)
#define ZIP_LO_16(a, b) SHUF(ivec, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HI_16(a, b) SHUF(ivec, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define ZIP_LO_8(a, b) SHUF(ivec, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HI_8(a, b) SHUF(ivec, a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define ZIP_LO_4(a, b) SHUF(ivec, a, b, 0, 4, 1, 5)
#define ZIP_HI_4(a, b) SHUF(ivec, a, b, 2, 6, 3, 7)
#define ZIP_LO_1(a, b) (a)
#define ZIP_HI_1(a, b) (b)
