/* Max pooling of channels-last images, 3 x 3 with stride 2 and one pixel of padding, forward and backward.
 *
 * Images are float or bfloat16, computed in float; the channels are whole vectors. Of equal pixels a window takes the
 * first, of NaNs the last, as torch does; `which` stores the taken one's index, 0 to 8, in a byte. Backward sums over the
 * one to four windows of a pixel, so that nothing is zeroed first and every pixel is written once.
 */

/* Intrinsics: of plain vectors GCC 12 converts bytes and halves one by one, and keeps masks in whole vectors. */
typedef uint16_t NAME(half) __attribute__((vector_size(VLEN * 2), may_alias, aligned(2)));
typedef uint8_t NAME(byte) __attribute__((vector_size(VLEN), may_alias, aligned(1)));
#define HALF(p) (*(NAME(half) *)(p))
#define BYTE(p) (*(NAME(byte) *)(p))
#if VLEN == 16
#define mask __mmask16
#define BETTER(v, best) (_mm512_cmp_ps_mask((__m512)(v), (__m512)(best), _CMP_GT_OQ) | \
                         _mm512_cmp_ps_mask((__m512)(v), (__m512)(v), _CMP_UNORD_Q))
#define PICK(so, a, b) ((vec)_mm512_mask_blend_ps(so, (__m512)(b), (__m512)(a)))
#define PICK_INT(so, a, b) ((ivec)_mm512_mask_blend_epi32(so, (__m512i)(b), (__m512i)(a)))
#define LOAD_HALF(p) ((ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))))
#define STORE_HALF(p, v) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtepi32_epi16((__m512i)(v)))
#define STORE_BYTE(p, v) _mm_storeu_si128((__m128i *)(p), _mm512_cvtepi32_epi8((__m512i)(v)))
#define IS(p, number) _mm_cmpeq_epi8_mask(_mm_loadu_si128((const __m128i *)(p)), _mm_set1_epi8((char)(number)))
#else
#define mask ivec
#define BETTER(v, best) (((v) > (best)) | ((v) != (v)))
#define PICK(so, a, b) SELECT(so, a, b)
#define PICK_INT(so, a, b) (((a) & (so)) | ((b) & ~(so)))
#if VLEN == 8
#define LOAD_HALF(p) ((ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define STORE_HALF(p, v) _mm_storeu_si128((__m128i *)(p), _mm_packus_epi32( \
    _mm256_castsi256_si128((__m256i)(v)), _mm256_extracti128_si256((__m256i)(v), 1)))
#define STORE_BYTE(p, v) _mm_storel_epi64((__m128i *)(p), _mm_packus_epi16(_mm_packus_epi32( \
    _mm256_castsi256_si128((__m256i)(v)), _mm256_extracti128_si256((__m256i)(v), 1)), _mm_setzero_si128()))
#define IS(p, number) ((ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))) == (number))
#else
#define LOAD_HALF(p) __builtin_convertvector(HALF(p), ivec)
#define STORE_HALF(p, v) (HALF(p) = __builtin_convertvector(v, NAME(half)))
#define STORE_BYTE(p, v) (BYTE(p) = __builtin_convertvector(v, NAME(byte)))
#define IS(p, number) (__builtin_convertvector(BYTE(p), ivec) == (number))
#endif
#endif

INLINE vec NAME(pixel)(const void *image, size_t at, int is_half) {
    if (!is_half) return LDU((const REAL *)image + at);
    return (vec)(LOAD_HALF((const uint16_t *)image + at) << 16);
}

INLINE void NAME(put_pixel)(void *image, size_t at, vec v, int is_half) {
    if (is_half) STORE_HALF((uint16_t *)image + at, ((ivec)v >> 16) & 0xffff);
    else STU((REAL *)image + at, v);
}

/* Round to the nearest bfloat16, ties to even. */
INLINE vec NAME(rounded)(vec v) {
    const ivec bits = (ivec)v, nearest = bits + 0x7fff + ((bits >> 16) & 1);
    const mask is_nan = BETTER(v, v); /* rounding could make it a number */
    return PICK(is_nan, v, (vec)nearest);
}

/* One window of VLEN channels, limited to rows and columns first to last of its three. */
INLINE void NAME(window)(const Pool *pool, size_t at, int first_y, int last_y, int first_x, int last_x, size_t to,
                         int is_half) {
    const size_t row = (size_t)pool->x_row * pool->c;
    const int first = first_y * 3 + first_x;
    vec best = NAME(pixel)(pool->x, at + first_y * row + first_x * pool->c, is_half);
    ivec which = (ivec){0} + first;
    UNROLL for (int y = first_y; y <= last_y; y++) {
        UNROLL for (int x = first_x; x <= last_x; x++) {
            if (y * 3 + x == first) continue;
            const vec v = NAME(pixel)(pool->x, at + y * row + x * pool->c, is_half);
            const mask better = BETTER(v, best);
            best = PICK(better, v, best);
            which = PICK_INT(better, (ivec){0} + (y * 3 + x), which);
        }
    }
    NAME(put_pixel)(pool->y, to, best, is_half);
    if (pool->which) STORE_BYTE(pool->which + to, which);
}

INLINE void NAME(max_pool_row)(const Pool *pool, int64_t image, int i, int is_half) {
    const int64_t h = pool->h, w = pool->w, c = pool->c, w_out = (w + 1) / 2, x_row = pool->x_row, y_row = pool->y_row;
    const int first_y = i ? 0 : 1, last_y = 2 * i + 1 < h ? 2 : 1;
    for (int64_t j = 0; j < w_out; j++) {
        const size_t at = ((image * h + 2 * i - 1) * x_row + 2 * j - 1) * c, to = ((image * ((h + 1) / 2) + i) * y_row + j) * c;
        const int first_x = j ? 0 : 1, last_x = 2 * j + 1 < w ? 2 : 1;
        for (int64_t k = 0; k < c; k += VLEN) {
            if (first_y == 0 && last_y == 2 && first_x == 0 && last_x == 2)
                NAME(window)(pool, at + k, 0, 2, 0, 2, to + k, is_half); /* the usual case, unrolled */
            else
                NAME(window)(pool, at + k, first_y, last_y, first_x, last_x, to + k, is_half);
        }
    }
}

/* The gradient that the window at `from` passes to its pixel `tap`, VLEN channels */
INLINE vec NAME(window_gradient)(const Pool *pool, size_t from, int tap, int is_half) {
    const mask own = IS(pool->which + from, tap);
    return PICK(own, NAME(pixel)(pool->y, from, is_half), ZERO);
}

INLINE void NAME(max_pool_row_backward)(const Pool *pool, int64_t image, int y, int is_half) {
    const int64_t h = pool->h, w = pool->w, c = pool->c, h_out = (h + 1) / 2, w_out = (w + 1) / 2, y_row = pool->y_row;
    const int i = y / 2, odd_y = y % 2, below = odd_y && i + 1 < h_out;
    for (int64_t x = 0; x < w; x++) {
        const int64_t j = x / 2;
        const int odd_x = x % 2, beside = odd_x && j + 1 < w_out;
        const size_t at = ((image * h + y) * pool->x_row + x) * c, from = ((image * h_out + i) * y_row + j) * c;
        const int tap = (odd_y ? 6 : 3) + (odd_x ? 2 : 1);
        for (int64_t k = 0; k < c; k += VLEN) {
            vec sum = NAME(window_gradient)(pool, from + k, tap, is_half);
            if (beside) sum += NAME(window_gradient)(pool, from + c + k, tap - 2, is_half);
            if (below) sum += NAME(window_gradient)(pool, from + y_row * c + k, tap - 6, is_half);
            if (below && beside) sum += NAME(window_gradient)(pool, from + (y_row + 1) * c + k, tap - 8, is_half);
            NAME(put_pixel)(pool->x, at + k, is_half ? NAME(rounded)(sum) : sum, is_half);
        }
    }
}

static TARGET void NAME(max_pool_worker)(void *data) {
    Pool *pool = data;
    const int64_t rows = pool->back ? pool->h : (pool->h + 1) / 2, units = pool->n * rows;
    for (int64_t unit; (unit = TAKE(pool)) < units;) {
        const int64_t end = unit + pool->grain < units ? unit + pool->grain : units;
        for (; unit < end; unit++) {
            const int64_t image = unit / rows;
            const int row = unit % rows;
            if (pool->back && pool->is_half) NAME(max_pool_row_backward)(pool, image, row, 1);
            else if (pool->back) NAME(max_pool_row_backward)(pool, image, row, 0);
            else if (pool->is_half) NAME(max_pool_row)(pool, image, row, 1);
            else NAME(max_pool_row)(pool, image, row, 0);
        }
    }
}

#undef HALF
#undef BYTE
#undef mask
#undef BETTER
#undef PICK
#undef PICK_INT
#undef LOAD_HALF
#undef STORE_HALF
#undef STORE_BYTE
#undef IS
