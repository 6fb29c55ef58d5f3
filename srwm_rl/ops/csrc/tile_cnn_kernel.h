/* A residual CNN of frames of bytes on the matrix tiles of AMX: its output, and the gradients of its weights.
 *
 * A thread computes one frame after the other, so that all activations stay in its cache; backward computes them again.
 * Activations and their gradients are bfloat16, sums are float. An image is [h + 2][w + 2][c] with a border of zeros.
 * Its flat pixels are those from the first one inside to the last one, the borders between them included.
 *
 * Products of matrices: C[16][16] += A[16][32] B[16][16][2], in which pairs of B's rows are interleaved. In a convolution
 * a row of A is what one row of the kernel covers, 32 numbers at a time, and the rows are 16 flat pixels; what they give
 * for borders is not stored. The gradient of weights is summed over flat pixels: A is the input, transposed to
 * [channels][pixels] and shifted by the place in the kernel; B is the output's gradient, zero on borders.
 */

#define TILES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma")))
#define INLINED __attribute__((always_inline))
enum { SIDE = 16, SPAN = 32, SLACK = 5 * SIDE, MOST_STEPS = 2048, MOST_ROW_TILES = 9 * 16 };
typedef uint16_t Half;

/* A convolution as tiles of its weights, [group of outputs][step][tile of outputs][16][16][2], and the same for the
 * gradient of its input; and where its sums begin: [row tile][tile of outputs][16][16], then [outputs] */
typedef struct {
    int n_in, n_out, kernel, is_first, steps, back_steps, row_tiles;
    Half *tiles, *back_tiles;
    size_t sums;
} Weights;

typedef struct {
    Weights *convs;
    float *sums; /* [n_shares][n_sums] */
    size_t n_sums;
} Prepared;

/* What a thread keeps of a layer's frame: the (first) convolution's output, rectified in a block, and the layer's; which
 * pixel each pooling window took; and gradients. */
typedef struct {
    Half *inner, *total, *rectified, *grad_inner, *grad;
    uint8_t *which;
} Activations;

static int parts(int n) { return (n + SPAN - 1) / SPAN; }

static const struct __attribute__((packed)) {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TILE_CONFIG = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

/* c[n][256] = the sums over steps of n <= 5 row tiles times one column tile; a_at: a's place in each step */
static inline TILES INLINED void tiles_5x1(int n, const Half *const *a, size_t a_row, const int *a_at, const Half *b,
                                           size_t b_row, size_t b_step, int steps, float *c) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    for (int s = 0; s < steps; s++) {
        _tile_loadd(5, b + s * b_step, b_row * 2);
        _tile_loadd(6, a[0] + a_at[s], a_row * 2);
        _tile_dpbf16ps(0, 6, 5);
        if (n > 1) {
            _tile_loadd(7, a[1] + a_at[s], a_row * 2);
            _tile_dpbf16ps(1, 7, 5);
        }
        if (n > 2) {
            _tile_loadd(6, a[2] + a_at[s], a_row * 2);
            _tile_dpbf16ps(2, 6, 5);
        }
        if (n > 3) {
            _tile_loadd(7, a[3] + a_at[s], a_row * 2);
            _tile_dpbf16ps(3, 7, 5);
        }
        if (n > 4) {
            _tile_loadd(6, a[4] + a_at[s], a_row * 2);
            _tile_dpbf16ps(4, 6, 5);
        }
    }
    _tile_stored(0, c, 64);
    if (n > 1) _tile_stored(1, c + 256, 64);
    if (n > 2) _tile_stored(2, c + 512, 64);
    if (n > 3) _tile_stored(3, c + 768, 64);
    if (n > 4) _tile_stored(4, c + 1024, 64);
}

/* c (+)= n <= 2 row tiles times two column tiles; c_row, c_tile and b_tile: from one tile to the next */
static inline TILES INLINED void tiles_2x2(int n, const Half *const *a, size_t a_row, const int *a_at, const Half *b, size_t b_row,
                            size_t b_tile, size_t b_step, int steps, float *c, size_t c_row, size_t c_tile, int add) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (add) {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + c_tile, 64);
        if (n > 1) {
            _tile_loadd(2, c + c_row, 64);
            _tile_loadd(3, c + c_row + c_tile, 64);
        }
    }
    for (int s = 0; s < steps; s++) {
        _tile_loadd(6, b + s * b_step, b_row * 2);
        _tile_loadd(7, b + s * b_step + b_tile, b_row * 2);
        _tile_loadd(4, a[0] + a_at[s], a_row * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (n > 1) {
            _tile_loadd(5, a[1] + a_at[s], a_row * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + c_tile, 64);
    if (n > 1) {
        _tile_stored(2, c + c_row, 64);
        _tile_stored(3, c + c_row + c_tile, 64);
    }
}

static inline TILES __m512 load_half(const Half *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

static inline TILES void store_half(Half *to, __m512 v) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(v));
}

static inline TILES __m512 relu16(__m512 v) { return _mm512_max_ps(_mm512_setzero_ps(), v); } /* NaN stays */

/* What follows a convolution: + bias + skip, zero where `mask` was rectified to zero, and a rectified copy; NULL: not */
typedef struct {
    const float *bias;
    const Half *skip, *mask;
    Half *to, *rectified;
} After;

static inline TILES INLINED void finish_with(int bias, int skip, int mask, int to, int rectified, const float *tile, int n,
                                             size_t pixel, int output, int h, int w, int c, const After *after) {
    const size_t row = w + 2, all = (size_t)h * row - 2, end = pixel + n * SIDE < all ? pixel + n * SIDE : all;
    const __m512 shift = bias ? _mm512_loadu_ps(after->bias + output) : _mm512_setzero_ps();
    for (size_t p = pixel; p < end;) {
        const size_t x = p % row, border = p - x + w, stop = border < end ? border : end;
        for (; p < stop; p++) {
            const size_t at = (p + row + 1) * c + output;
            __m512 v = _mm512_load_ps(tile + (p - pixel) * SIDE);
            if (bias) v = _mm512_add_ps(v, shift);
            if (mask) {
                const __mmask16 keep = _mm512_cmp_ps_mask(load_half(after->mask + at), _mm512_setzero_ps(), _CMP_NLE_UQ);
                v = _mm512_maskz_mov_ps(keep, v);
            }
            if (skip) v = _mm512_add_ps(v, load_half(after->skip + at));
            if (to) store_half(after->to + at, v);
            if (rectified) store_half(after->rectified + at, relu16(v));
        }
        if (stop == border) p = border + 2;
    }
}

/* Store n tiles of 16 flat pixels from `pixel` on, 16 outputs from `output` on of c. */
static TILES void finish(const float *tile, int n, size_t pixel, int output, int h, int w, int c, const After *after) {
#define WITH(...) finish_with(__VA_ARGS__, tile, n, pixel, output, h, w, c, after)
    switch ((after->bias != 0) << 4 | (after->skip != 0) << 3 | (after->mask != 0) << 2 | (after->to != 0) << 1 |
            (after->rectified != 0)) {
        case 0x11: WITH(1, 0, 0, 0, 1); break; /* inside a block */
        case 0x1b: WITH(1, 1, 0, 1, 1); break; /* its end */
        case 0x12: WITH(1, 0, 0, 1, 0); break; /* before pooling */
        case 0x13: WITH(1, 0, 0, 1, 1); break; /* patches */
        case 0x06: WITH(0, 0, 1, 1, 0); break; /* gradients: inside a block */
        case 0x0e: WITH(0, 1, 1, 1, 0); break; /* its input's */
        case 0x02: WITH(0, 0, 0, 1, 0); break; /* that of what was pooled */
    }
#undef WITH
}

/* Four tiles of a convolution's output, which are finished while the next ones are computed */
typedef struct {
    float *c;
    size_t pixel;
    int output, two; /* two outputs of two tiles of pixels, or one of four */
} Group;

static TILES void finish_group(const Group *group, int h, int w, int c, const After *after) {
    if (!group->c) return;
    finish(group->c, group->two ? 2 : 4, group->pixel, group->output, h, w, c, after);
    if (group->two) finish(group->c + 512, 2, group->pixel, group->output + SIDE, h, w, c, after);
}

/* A convolution of an image with tiles of weights: parts of `rows` rows below each other, 3 for a kernel of 3 x 3 (or the
 * gradient of its input), 1 for an image of columns. */
static TILES void convolve(const Half *image, int rows, int h, int w, int c_in, int c_out, const Half *tiles, int steps,
                           const After *after) {
    _Alignas(64) float c[2][4 * 256];
    const size_t row = w + 2, end = (size_t)h * row;
    const int per_row = steps / rows;
    Group last = {0};
    int at[MOST_STEPS], flip = 0;
    for (int s = 0; s < steps; s++) at[s] = s / per_row * (int)row * c_in + s % per_row * SPAN;
    for (size_t p = 0; p < end; p += 4 * SIDE) {
        const Half *tile = tiles, *a[5];
        for (int i = 0; i < 4; i++) a[i] = image + (p + i * SIDE) * c_in;
        for (int output = 0; output < c_out;) {
            const int two = c_out - output >= SPAN;
            for (int i = 0; i < 4 && p + i * SIDE < end; i += two ? 2 : 4) {
                const Group group = {c[flip], p + i * SIDE, output, two};
                if (two) tiles_2x2(2, a + i, c_in, at, tile, SPAN, 512, 1024, steps, c[flip], 256, 512, 0);
                else tiles_5x1(4, a, c_in, at, tile, SPAN, 512, steps, c[flip]);
                finish_group(&last, h, w, c_out, after);
                last = group, flip = !flip;
            }
            output += two ? SPAN : SIDE, tile += steps * (two ? 1024 : 512);
        }
    }
    finish_group(&last, h, w, c_out, after);
}

/* One window of 16 channels, limited to rows and columns first to last of its three: of equals the first.
 * A NaN may be lost here, if a pixel after it is a number. */
static inline TILES INLINED void window(const Half *from, size_t row, int c, int first_y, int last_y,
                                                               int first_x, int last_x, Half *total, Half *rectified,
                                                               uint8_t *which) {
    const int first = first_y * 3 + first_x;
    __m512 best = load_half(from + first_y * row + first_x * c);
    __m512i taken = _mm512_set1_epi32(first);
    _Pragma("GCC unroll 3") for (int i = first_y; i <= last_y; i++) {
        _Pragma("GCC unroll 3") for (int j = first_x; j <= last_x; j++) {
            if (i * 3 + j == first) continue;
            const __m512 v = load_half(from + i * row + j * c);
            const __mmask16 better = _mm512_cmp_ps_mask(v, best, _CMP_NLE_UQ);
            best = _mm512_mask_mov_ps(best, better, v);
            taken = _mm512_mask_mov_epi32(taken, better, _mm512_set1_epi32(i * 3 + j));
        }
    }
    store_half(total, best);
    store_half(rectified, relu16(best));
    if (which) _mm_storeu_si128((__m128i *)which, _mm512_cvtepi32_epi8(taken));
}

/* Max pooling, 3 x 3 with stride 2, from an image [h_in][w_in] to [h][w] */
static TILES void pool(const Half *from, const Layer *layer, Half *total, Half *rectified, uint8_t *which) {
    const int c = layer->c;
    const size_t row_in = (size_t)(layer->w_in + 2) * c, row = (size_t)(layer->w + 2) * c;
    for (int y = 0; y < layer->h; y++) {
        const int first_y = y ? 0 : 1, last_y = 2 * y + 1 < layer->h_in ? 2 : 1;
        for (int x = 0; x < layer->w; x++) {
            const int first_x = x ? 0 : 1, last_x = 2 * x + 1 < layer->w_in ? 2 : 1;
            const Half *corner = from + 2 * y * row_in + (size_t)(2 * x) * c; /* with the border */
            const size_t to = (y + 1) * row + (size_t)(x + 1) * c;
            for (int k = 0; k < c; k += SIDE) {
                uint8_t *taken = which ? which + to + k : 0;
                if (first_y == 0 && last_y == 2 && first_x == 0 && last_x == 2)
                    window(corner + k, row_in, c, 0, 2, 0, 2, total + to + k, rectified + to + k, taken);
                else
                    window(corner + k, row_in, c, first_y, last_y, first_x, last_x, total + to + k, rectified + to + k, taken);
            }
        }
    }
}

/* The part of a window's gradient that its pixel `tap` gets */
static inline TILES __m512 window_part(const Half *grad, const uint8_t *which, size_t at, int tap) {
    const __mmask16 own = _mm_cmpeq_epi8_mask(_mm_loadu_si128((const __m128i *)(which + at)), _mm_set1_epi8((char)tap));
    return _mm512_maskz_mov_ps(own, load_half(grad + at));
}

static TILES void pool_backward(const Half *grad, const Layer *layer, const uint8_t *which, Half *grad_from) {
    const int c = layer->c, row_in = layer->w_in + 2, row = layer->w + 2;
    for (int y = 0; y < layer->h_in; y++) {
        const int odd_y = y % 2, below = odd_y && y / 2 + 1 < layer->h;
        for (int x = 0; x < layer->w_in; x++) {
            const int odd_x = x % 2, beside = odd_x && x / 2 + 1 < layer->w;
            const size_t at = ((size_t)(y / 2 + 1) * row + x / 2 + 1) * c, to = ((size_t)(y + 1) * row_in + x + 1) * c;
            const int tap = (odd_y ? 6 : 3) + (odd_x ? 2 : 1);
            for (int k = 0; k < c; k += SIDE) {
                __m512 sum = window_part(grad, which, at + k, tap);
                if (beside) sum = _mm512_add_ps(sum, window_part(grad, which, at + c + k, tap - 2));
                if (below) sum = _mm512_add_ps(sum, window_part(grad, which, at + row * c + k, tap - 6));
                if (below && beside) sum = _mm512_add_ps(sum, window_part(grad, which, at + (row + 1) * c + k, tap - 8));
                store_half(grad_from + to + k, sum);
            }
        }
    }
}

/* to [16][n] = from [n][16 of c], n a multiple of 16 */
static TILES void transpose(const Half *from, int c, size_t n, Half *to, size_t to_row) {
    for (size_t p = 0; p < n; p += SIDE) {
        __m256i a[SIDE], b[SIDE];
        for (int i = 0; i < SIDE; i++) a[i] = _mm256_loadu_si256((const __m256i *)(from + (p + i) * c));
        for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm256_unpacklo_epi16(a[i], a[i + 8]);
            b[2 * i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 8]);
        }
        for (int i = 0; i < 8; i++) {
            a[2 * i] = _mm256_unpacklo_epi16(b[i], b[i + 8]);
            a[2 * i + 1] = _mm256_unpackhi_epi16(b[i], b[i + 8]);
        }
        for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm256_unpacklo_epi16(a[i], a[i + 8]);
            b[2 * i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 8]);
        }
        /* Each round moves the highest bit of the pixel to the place within a vector; the fourth one completes it. */
        for (int i = 0; i < 8; i++) {
            const __m256i lo = _mm256_unpacklo_epi16(b[i], b[i + 8]), hi = _mm256_unpackhi_epi16(b[i], b[i + 8]);
            Half *rows = to + p;
            _mm_storeu_si128((__m128i *)(rows + (size_t)i * to_row), _mm256_castsi256_si128(lo));
            _mm_storeu_si128((__m128i *)(rows + (size_t)i * to_row + 8), _mm256_castsi256_si128(hi));
            _mm_storeu_si128((__m128i *)(rows + (size_t)(i + 8) * to_row), _mm256_extracti128_si256(lo, 1));
            _mm_storeu_si128((__m128i *)(rows + (size_t)(i + 8) * to_row + 8), _mm256_extracti128_si256(hi, 1));
        }
    }
}

/* pairs [n / 2][c][2] = the flat pixels of an image in pairs; their sums are added to sums [c]. n even */
static TILES void pair_up(const Half *image, int w, int c, size_t n, Half *pairs, float *sums) {
    const Half *from = image + (size_t)(w + 3) * c;
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int k = 0; k < c; k += SIDE) {
        __m512 sum = _mm512_setzero_ps();
        for (size_t p = 0; p < n; p += 2) {
            const __m256i first = _mm256_loadu_si256((const __m256i *)(from + p * c + k));
            const __m256i second = _mm256_loadu_si256((const __m256i *)(from + (p + 1) * c + k));
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
            const __m512i pair = _mm512_permutexvar_epi16(order, both);
            _mm512_storeu_si512(pairs + p * c + k * 2, pair);
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)));
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000))));
        }
        _mm512_storeu_ps(sums + k, _mm512_add_ps(_mm512_loadu_ps(sums + k), sum));
    }
}

/* Add a convolution's gradients by its output's: row tiles of the transposed input times column tiles of pairs. */
static TILES void add_weight_gradient(const Half *const *row_tiles, int n_row_tiles, size_t plane, const Half *grad, int h,
                                      int w, int c, Half *pairs, float *sums) {
    const int steps = (int)(((size_t)h * (w + 2) + SPAN - 1) / SPAN), n_tiles = c / SIDE;
    int at[MOST_STEPS];
    for (int s = 0; s < steps; s++) at[s] = s * SPAN;
    pair_up(grad, w, c, (size_t)steps * SPAN, pairs, sums + (size_t)n_row_tiles * n_tiles * 256);
    for (int tile = 0; tile < n_tiles;) {
        const Half *b = pairs + tile * SPAN;
        if (n_tiles - tile > 1) {
            for (int r = 0; r < n_row_tiles; r += 2) {
                tiles_2x2(n_row_tiles - r > 1 ? 2 : 1, row_tiles + r, plane, at, b, 2 * c, SPAN, (size_t)SPAN * c, steps,
                          sums + ((size_t)r * n_tiles + tile) * 256, (size_t)n_tiles * 256, 256, 1);
            }
            tile += 2;
        } else {
            _Alignas(64) float part[5 * 256];
            for (int r = 0; r < n_row_tiles; r += 5) {
                const int n = n_row_tiles - r > 5 ? 5 : n_row_tiles - r;
                tiles_5x1(n, row_tiles + r, plane, at, b, 2 * c, (size_t)SPAN * c, steps, part);
                for (int i = 0; i < n; i++) {
                    float *to = sums + ((size_t)(r + i) * n_tiles + tile) * 256;
                    for (int k = 0; k < 256; k++) to[k] += part[i * 256 + k];
                }
            }
            tile += 1;
        }
    }
}

/* Numbers for each pixel of the first convolution: what its kernel covers, in parts of 32 */
static int columns_of(const Layer *layer) { return parts(layer->kernel * layer->kernel * layer->c_in) * SPAN; }

/* Numbers of an image with its border, and what tiles read beyond it */
static size_t image_size(int h, int w, int c) { return ((size_t)(h + 2) * (w + 2) + SLACK) * c + SPAN; }

/* The length of a plane of the transposed image: shifts in the kernel and whole steps, and no power of two */
static size_t plane_size(int h, int w) { return ((size_t)(h + 2) * (w + 2) + SLACK + SPAN - 1) / SPAN * SPAN + SPAN; }

typedef struct {
    Half *frame, *columns, *planes, *pairs;
    Activations layers[MOST_LAYERS];
} Thread;

/* Set the pointers of a thread's memory from `at` on; return its size. */
static size_t lay_out(const Cnn *cnn, Thread *thread, char *at) {
    size_t size = 0, planes = 0, pairs = 0;
#define PART(pointer, type, n) (pointer = (type *)(at + size), size += ((size_t)(n) * sizeof(type) + 63) / 64 * 64 + 64)
    const Layer *first = cnn->layers;
    PART(thread->frame, Half, image_size(first->h_in, first->w_in, first->c_in));
    for (int k = 0; k < cnn->n_layers; k++) {
        const Layer *layer = cnn->layers + k;
        Activations *own = thread->layers + k;
        const int pooled = layer->kind == CONV_AND_POOL;
        const int h = pooled ? layer->h_in : layer->h, w = pooled ? layer->w_in : layer->w;
        const size_t inner = image_size(h, w, layer->c), outer = image_size(layer->h, layer->w, layer->c);
        if (!k) PART(thread->columns, Half, image_size(h, w, columns_of(layer)));
        PART(own->inner, Half, inner);
        PART(own->total, Half, outer);
        PART(own->rectified, Half, outer);
        PART(own->which, uint8_t, outer);
        if (cnn->grad_y) {
            PART(own->grad_inner, Half, inner);
            PART(own->grad, Half, outer);
            const size_t rows = k ? layer->c_in : columns_of(layer);
            const size_t plane = plane_size(h, w) * (rows > (size_t)layer->c ? rows : (size_t)layer->c);
            planes = planes > plane ? planes : plane;
            pairs = pairs > inner ? pairs : inner;
        }
    }
    PART(thread->planes, Half, planes);
    PART(thread->pairs, Half, pairs);
#undef PART
    return size;
}

/* The numbers of a frame that a convolution's kernel covers at each of its flat pixels, in rows of a multiple of 32; the
 * frame's own, with a border for a kernel of 3 x 3, are made first. Integers up to 256 are exact. */
static TILES void load_frame(const uint8_t *bytes, const Layer *layer, Half *frame, Half *columns) {
    const int border = layer->kind == CONV_AND_POOL, c = layer->c_in, n = layer->w_in * c, k = layer->kernel;
    const int h = border ? layer->h_in : layer->h, w = border ? layer->w_in : layer->w, stride = border ? 1 : k;
    const size_t width = (layer->w_in + 2 * border) * c, size = columns_of(layer);
    for (int y = 0; y < layer->h_in; y++) {
        Half *row = frame + (y + border) * width + border * c;
        int i = 0;
        for (; i + SIDE <= n; i += SIDE, bytes += SIDE)
            store_half(row + i, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes))));
        for (; i < n; i++, bytes++) {
            const float number = *bytes;
            uint32_t bits;
            memcpy(&bits, &number, 4);
            row[i] = bits >> 16;
        }
    }
    for (int y = 0; y < h; y++) {
        for (int x = 0; x < w; x++) {
            const Half *from = frame + (size_t)y * stride * width + x * stride * c;
            Half *to = columns + ((size_t)y * (w + 2) + x) * size;
            for (int i = 0; i < k; i++) /* 16 numbers for k * c: the next row, or pixel, or nothing that is used, replaces the others */
                _mm256_storeu_si256((__m256i *)(to + i * k * c), _mm256_loadu_si256((const __m256i *)(from + i * width)));
        }
    }
}

static TILES void forward_frame(const Cnn *cnn, Thread *thread, const uint8_t *frame) {
    const Prepared *prepared = cnn->prepared;
    load_frame(frame, cnn->layers, thread->frame, thread->columns);
    const Half *total = thread->columns, *rectified = 0;
    for (int k = 0; k < cnn->n_layers; k++) {
        const Layer *layer = cnn->layers + k;
        const Weights *conv = prepared->convs + layer->conv;
        const float *bias = cnn->biases[layer->conv];
        Activations *own = thread->layers + k;
        if (layer->kind == BLOCK) {
            const After first = {bias, 0, 0, 0, own->inner};
            const After second = {cnn->biases[layer->conv + 1], total, 0, own->total, own->rectified};
            convolve(rectified, 3, layer->h, layer->w, layer->c, layer->c, conv->tiles, conv->steps, &first);
            convolve(own->inner, 3, layer->h, layer->w, layer->c, layer->c, conv[1].tiles, conv[1].steps, &second);
        } else if (layer->kind == PATCHES) {
            const After after = {bias, 0, 0, own->total, own->rectified};
            convolve(total, 1, layer->h, layer->w, columns_of(layer), layer->c, conv->tiles, conv->steps, &after);
        } else {
            const After after = {bias, 0, 0, own->inner, 0};
            convolve(total, k ? 3 : 1, layer->h_in, layer->w_in, k ? layer->c_in : columns_of(layer), layer->c, conv->tiles,
                     conv->steps, &after);
            pool(own->inner, layer, own->total, own->rectified, cnn->grad_y ? own->which : 0);
        }
        total = own->total, rectified = own->rectified;
    }
}

/* The rectified last output, channels first */
static void store_output(const Cnn *cnn, const Thread *thread, Half *y) {
    const Layer *last = cnn->layers + cnn->n_layers - 1;
    const Half *from = thread->layers[cnn->n_layers - 1].rectified;
    for (int k = 0; k < last->c; k++) {
        for (int i = 0; i < last->h; i++) {
            for (int j = 0; j < last->w; j++) *y++ = from[((size_t)(i + 1) * (last->w + 2) + j + 1) * last->c + k];
        }
    }
}

static void load_output_gradient(const Cnn *cnn, const Thread *thread, const Half *grad_y) {
    const Layer *last = cnn->layers + cnn->n_layers - 1;
    const Activations *own = thread->layers + cnn->n_layers - 1;
    for (int k = 0; k < last->c; k++) {
        for (int i = 0; i < last->h; i++) {
            for (int j = 0; j < last->w; j++, grad_y++) {
                const size_t at = ((size_t)(i + 1) * (last->w + 2) + j + 1) * last->c + k;
                const Half was = own->rectified[at];
                own->grad[at] = was & 0x7fff ? *grad_y : 0;
            }
        }
    }
}

/* Add the gradients of a convolution's weights, `rows` as of convolve. */
static TILES void add_conv_gradient(const Cnn *cnn, const Thread *thread, const Half *image, int rows, const Half *grad, int h,
                                    int w, int number, float *sums) {
    const Weights *conv = ((const Prepared *)cnn->prepared)->convs + number;
    const size_t plane = plane_size(h, w), row = w + 2, n = ((size_t)(h + rows - 1) * row + SLACK) / SIDE * SIDE;
    const int c = conv->is_first ? columns_of(cnn->layers) : conv->n_in, per_tap = c / SIDE;
    const Half *tiles[MOST_ROW_TILES];
    for (int m = 0; m < per_tap; m++) transpose(image + m * SIDE, c, n, thread->planes + m * SIDE * plane, plane);
    for (int r = 0; r < conv->row_tiles; r++) {
        const int tap = r / per_tap;
        tiles[r] = thread->planes + r % per_tap * SIDE * plane + tap / 3 * row + tap % 3;
    }
    add_weight_gradient(tiles, conv->row_tiles, plane, grad, h, w, conv->n_out, thread->pairs, sums + conv->sums);
}

static TILES void backward_frame(const Cnn *cnn, Thread *thread, const Half *grad_y, float *sums) {
    const Prepared *prepared = cnn->prepared;
    load_output_gradient(cnn, thread, grad_y);
    for (int k = (int)cnn->n_layers - 1; k >= 0; k--) {
        const Layer *layer = cnn->layers + k;
        const Weights *conv = prepared->convs + layer->conv;
        Activations *own = thread->layers + k, *before = own - 1;
        if (layer->kind == BLOCK) {
            const After inner = {0, 0, own->inner, own->grad_inner, 0};
            const After outer = {0, own->grad, before->rectified, before->grad, 0};
            add_conv_gradient(cnn, thread, own->inner, 3, own->grad, layer->h, layer->w, layer->conv + 1, sums);
            convolve(own->grad, 3, layer->h, layer->w, layer->c, layer->c, conv[1].back_tiles, conv[1].back_steps, &inner);
            add_conv_gradient(cnn, thread, before->rectified, 3, own->grad_inner, layer->h, layer->w, layer->conv, sums);
            convolve(own->grad_inner, 3, layer->h, layer->w, layer->c, layer->c, conv->back_tiles, conv->back_steps, &outer);
        } else if (layer->kind == PATCHES) {
            add_conv_gradient(cnn, thread, thread->columns, 1, own->grad, layer->h, layer->w, layer->conv, sums);
        } else {
            pool_backward(own->grad, layer, own->which, own->grad_inner);
            if (!k) {
                add_conv_gradient(cnn, thread, thread->columns, 1, own->grad_inner, layer->h_in, layer->w_in, layer->conv, sums);
            } else {
                const After after = {0, 0, 0, before->grad, 0};
                add_conv_gradient(cnn, thread, before->total, 3, own->grad_inner, layer->h_in, layer->w_in, layer->conv, sums);
                convolve(own->grad_inner, 3, layer->h_in, layer->w_in, layer->c, layer->c_in, conv->back_tiles, conv->back_steps,
                         &after);
            }
        }
    }
}

static TILES void tile_cnn_worker(void *data) {
    Cnn *cnn = data;
    const Prepared *prepared = cnn->prepared;
    const Layer *first = cnn->layers, *last = first + cnn->n_layers - 1;
    const size_t n_in = (size_t)first->h_in * first->w_in * first->c_in, n_out = (size_t)last->h * last->w * last->c;
    Thread thread;
    char before[64];
    char *block = calloc(lay_out(cnn, &thread, 0) + 64, 1);
    if (!block) {
        cnn->failed = 1;
        return;
    }
    lay_out(cnn, &thread, (char *)ALIGN(block));
    _tile_storeconfig(before);
    _tile_loadconfig(&TILE_CONFIG);
    for (int64_t share; (share = TAKE(cnn)) < cnn->n_shares;) {
        const int64_t end = cnn->n * (share + 1) / cnn->n_shares;
        for (int64_t i = cnn->n * share / cnn->n_shares; i < end; i++) {
            for (size_t at = 0; i + 1 < end && at < n_in; at += 64) _mm_prefetch(cnn->frames + (i + 1) * n_in + at, _MM_HINT_T1);
            forward_frame(cnn, &thread, cnn->frames + i * n_in);
            if (cnn->grad_y) backward_frame(cnn, &thread, (const Half *)cnn->grad_y + i * n_out, prepared->sums + share * prepared->n_sums);
            else store_output(cnn, &thread, (Half *)cnn->y + i * n_out);
        }
    }
    _tile_loadconfig(before);
    free(block);
}

static Half to_half(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if (number != number) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* Where a convolution's weight [n_out][n_in][k][k] has number `i` of what row `y` of its kernel covers, of which the first
 * convolution has all in one row; or, back, the same of the gradient of its input, a convolution with the kernel turned
 * round. NULL: beyond the kernel. `stride`: from one output to the next. */
static const float *weight_at(const float *weight, const Weights *conv, int back, int y, int i, size_t *stride) {
    const int k = conv->kernel, n = back ? conv->n_out : conv->n_in, x = i / n, channel = i % n;
    if (x >= (conv->is_first ? k * k : k)) return 0;
    *stride = back ? (size_t)k * k : (size_t)conv->n_in * k * k;
    if (back) return weight + ((size_t)channel * conv->n_in * k + k - 1 - y) * k + k - 1 - x;
    return weight + (size_t)channel * k * k + y * k + x;
}

static void make_tiles(const float *weight, const Weights *conv, int back, float scale, Half *to) {
    const int n_out = back ? conv->n_in : conv->n_out, steps = back ? conv->back_steps : conv->steps;
    const int per_row = steps / (conv->is_first ? 1 : 3);
    for (int output = 0; output < n_out;) {
        const int n_tiles = n_out - output >= SPAN ? 2 : 1;
        for (int s = 0; s < steps; s++) {
            for (int i = 0; i < SPAN; i++) {
                size_t stride = 0;
                const float *from = weight_at(weight, conv, back, s / per_row, s % per_row * SPAN + i, &stride);
                Half *tile = to + (size_t)s * n_tiles * 512 + i / 2 * SPAN + i % 2;
                for (int o = 0; o < n_tiles * SIDE; o++)
                    tile[o / SIDE * 512 + o % SIDE * 2] = from ? to_half(from[(output + o) * stride] * scale) : 0;
            }
        }
        to += (size_t)steps * n_tiles * 512;
        output += n_tiles * SIDE;
    }
}

static void describe(const Cnn *cnn, Prepared *prepared) {
    for (int k = 0; k < cnn->n_layers; k++) {
        const Layer *layer = cnn->layers + k;
        for (int i = 0; i <= (layer->kind == BLOCK); i++) {
            Weights *conv = prepared->convs + layer->conv + i;
            const int kernel = layer->kind == PATCHES ? layer->kernel : 3, n_in = layer->kind == BLOCK ? layer->c : layer->c_in;
            *conv = (Weights){.n_in = n_in, .n_out = layer->c, .kernel = kernel, .is_first = !k};
            conv->steps = k ? 3 * parts(3 * n_in) : parts(kernel * kernel * n_in);
            conv->back_steps = k ? 3 * parts(3 * layer->c) : 0;
            conv->row_tiles = k ? 9 * n_in / SIDE : 2 * conv->steps;
            conv->sums = prepared->n_sums;
            prepared->n_sums += (size_t)conv->row_tiles * layer->c * SIDE + layer->c;
        }
    }
}

/* Add up the shares, always in the same order. */
static void reduce_tiles(const Cnn *cnn) {
    const Prepared *prepared = cnn->prepared;
    for (int number = 0; number < cnn->n_convs; number++) {
        const Weights *conv = prepared->convs + number;
        const int k = conv->kernel, n_tiles = conv->n_out / SIDE;
        float *weight = cnn->grad_weights[number], *bias = cnn->grad_biases[number];
        const float scale = conv->is_first ? cnn->scale : 1;
        memset(weight, 0, (size_t)conv->n_out * conv->n_in * k * k * sizeof(float));
        memset(bias, 0, conv->n_out * sizeof(float));
        for (int64_t share = 0; share < cnn->n_shares; share++) {
            const float *sums = prepared->sums + share * prepared->n_sums + conv->sums;
            for (int row = 0; row < conv->row_tiles * SIDE; row++) {
                const int input = row % conv->n_in, tap = row / conv->n_in;
                if (tap >= k * k) break;
                const float *from = sums + (size_t)(row / SIDE) * n_tiles * 256 + row % SIDE * SIDE;
                float *to = weight + (size_t)input * k * k + tap;
                for (int output = 0; output < conv->n_out; output++)
                    to[(size_t)output * conv->n_in * k * k] += scale * from[output / SIDE * 256 + output % SIDE];
            }
            for (int output = 0; output < conv->n_out; output++)
                bias[output] += sums[(size_t)conv->row_tiles * n_tiles * 256 + output];
        }
    }
}

/* Make the tiles of all weights, run the worker, and add up the gradients. Return 1 without memory. */
static int run_tile_cnn(Cnn *cnn, unsigned threads, Parallel parallel) {
    const int back = cnn->grad_y != 0;
    Prepared prepared = {.convs = calloc(cnn->n_convs, sizeof(Weights))};
    if (!prepared.convs) return 1;
    describe(cnn, &prepared);
    size_t size = 0;
    for (Weights *conv = prepared.convs; conv < prepared.convs + cnn->n_convs; conv++)
        size += ((size_t)conv->steps * conv->n_out + (size_t)conv->back_steps * conv->n_in) * SPAN;
    /* The number of shares, and so the gradients' last bits, depends on the sizes alone. */
    const int64_t shares = (cnn->n + (back ? 31 : 7)) / (back ? 32 : 8), most = MOST_SUMS / (int64_t)prepared.n_sums + 1;
    cnn->n_shares = back && shares > most ? most : shares;
    cnn->grain = 1;
    cnn->next = cnn->failed = 0;
    cnn->prepared = &prepared;
    char *tiles = malloc(size * sizeof(Half) + 64);
    char *sums = back ? calloc(cnn->n_shares * prepared.n_sums + LANES, sizeof(float)) : 0;
    cnn->failed = !tiles || (back && !sums);
    if (!cnn->failed) {
        Half *at = (Half *)ALIGN(tiles);
        prepared.sums = (float *)ALIGN(sums);
        for (int i = 0; i < cnn->n_convs; i++) {
            Weights *conv = prepared.convs + i;
            conv->tiles = at;
            make_tiles(cnn->weights[i], conv, 0, conv->is_first ? cnn->scale : 1, at);
            at += (size_t)conv->steps * conv->n_out * SPAN;
            if (!back || conv->is_first) continue;
            conv->back_tiles = at;
            make_tiles(cnn->weights[i], conv, 1, 1, at);
            at += (size_t)conv->back_steps * conv->n_in * SPAN;
        }
        run_parallel(tile_cnn_worker, cnn, threads, parallel);
        if (back && !cnn->failed) reduce_tiles(cnn);
    }
    free(prepared.convs);
    free(tiles);
    free(sums);
    return cnn->failed;
}

/* Whether the processor has the instructions and the system lets this process use them */
static int has_tiles(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0; /* AVX512_BF16 */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1 & d >> 24) == 0) return 0; /* AMX-BF16 and AMX-TILE */
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM of the tiles' state */
}
