/* A residual CNN of frames of bytes in float, by the processor's vectors: its output, and the gradients of its weights.
 *
 * A thread computes one frame after the other, so that what a layer gives stays in its cache for the next one. An image is
 * [h + 2][w + 2][c] with a border of zeros. What a row of a kernel covers of an image is contiguous: a convolution adds up
 * products of such numbers, one at a time, with vectors of weights, for some pixels side by side whose sums stay in
 * registers. The gradient of the weights does the same with vectors of the output's gradient, summed over pixels.
 *
 * Where height and width are multiples of 4, and not too small, kernels of 3 x 3 are computed by Winograd's minimal
 * filtering F(4 x 4, 3 x 3) (Lavin and Gray, 2016, https://arxiv.org/abs/1509.09308): tiles of 6 x 6 inputs, the kernel
 * and tiles of 4 x 4 outputs are transformed, and in between there are 36 products instead of 144. With the paper's matrices, Y = A' [(G g G') (B' d B)] A;
 * so the gradient of g is G' [(B' d B) (A dY A')] G, summed over tiles.
 */

/* What follows a convolution: + bias + skip, zero where `mask` was rectified to zero, and a rectified copy; NULL: not */
typedef struct {
    const float *bias, *skip, *mask;
    float *to, *rectified;
} NAME(after);

/* sums [P][V] += the products of rows x len numbers of P pixels, `step` numbers from one to the next, and weights */
INLINE void NAME(add_products)(int P, int V, const float *from, size_t row, size_t step, int rows, int len,
                               const float *weight, size_t n_out, vec sums[][2]) {
    for (int r = 0; r < rows; r++, from += row) {
        for (int j = 0; j < len; j++, weight += n_out) {
            vec w[2];
            UNROLL for (int v = 0; v < V; v++) w[v] = LDU(weight + v * VLEN);
            UNROLL_12 for (int p = 0; p < P; p++) {
                const float x = from[p * step + j];
                UNROLL for (int v = 0; v < V; v++) sums[p][v] += x * w[v];
            }
        }
    }
}

/* Store a vector of outputs, from number `output` on of a pixel's, at `to` in the output's image. */
INLINE void NAME(finish)(vec sum, size_t to, int output, const NAME(after) *after) {
    if (after->bias) sum += LDU(after->bias + output);
    if (after->mask) sum = SELECT(LDU(after->mask + to) <= ZERO, ZERO, sum);
    if (after->skip) sum += LDU(after->skip + to);
    if (after->to) STU(after->to + to, sum);
    if (after->rectified) STU(after->rectified + to, VMAX(ZERO, sum));
}

/* P pixels and V vectors of outputs of a convolution; `at`: where they are in the output's image */
INLINE void NAME(convolve_block)(int P, int V, const float *from, size_t row, size_t step, int rows, int len,
                                 const float *weight, size_t n_out, size_t at, int output, const NAME(after) *after) {
    vec sums[MOST_SIDE_BY_SIDE][2] = {0};
    NAME(add_products)(P, V, from, row, step, rows, len, weight + output, n_out, sums);
    for (int p = 0; p < P; p++) {
        for (int v = 0; v < V; v++) {
            const int k = output + v * VLEN;
            NAME(finish)(sums[p][v], at + p * n_out + k, k, after);
        }
    }
}

/* A convolution to an image [h][w][n_out] with a border. Its kernel has `rows` rows, each covering `len` numbers of an image
 * with rows of `row` numbers, and moves by `stride` pixels of n_in. */
static TARGET NOINLINE void NAME(convolve)(const float *image, size_t row, int n_in, int stride, int rows, int len, int h,
                                           int w, int n_out, const float *weight, const NAME(after) *after) {
    const size_t step = (size_t)stride * n_in;
    const NAME(after) local = *after; /* which no store can change */
    for (int output = 0; output < n_out;) {
        const int two = n_out - output >= 2 * VLEN;
        for (int y = 0; y < h; y++) {
            for (int x = 0; x < w;) {
                const int left = w - x;
                const float *from = image + y * stride * row + x * step;
                const size_t at = ((size_t)(y + 1) * (w + 2) + x + 1) * n_out;
#define BLOCK_OF(P, V) \
    (NAME(convolve_block)(P, V, from, row, step, rows, len, weight, n_out, at, output, &local), x += P)
                if (!two && left >= 12) BLOCK_OF(12, 1);
                else if (left >= 6 && left != 8 && two) BLOCK_OF(6, 2);
                else if (left >= 4 && two) BLOCK_OF(4, 2);
                else if (left >= 4) BLOCK_OF(4, 1);
                else if (two) BLOCK_OF(1, 2);
                else BLOCK_OF(1, 1);
#undef BLOCK_OF
            }
        }
        output += two ? 2 * VLEN : VLEN;
    }
}

/* sums [J][V] += J numbers of what a row of the kernel covers times V vectors of the output's gradient, summed over
 * n_rows x w pixels */
INLINE void NAME(gradient_block)(int J, int V, const float *from, size_t row, size_t step, const float *grad, size_t grad_row,
                                 size_t n_out, int n_rows, int w, float *to) {
    vec sums[MOST_SIDE_BY_SIDE][2];
    UNROLL_12 for (int j = 0; j < J; j++) {
        UNROLL for (int v = 0; v < V; v++) sums[j][v] = LDU(to + j * n_out + v * VLEN);
    }
    for (int y = 0; y < n_rows; y++) {
        const float *x = from + y * row, *g = grad + y * grad_row;
        for (int i = 0; i < w; i++, x += step, g += n_out) {
            vec outputs[2];
            UNROLL for (int v = 0; v < V; v++) outputs[v] = LDU(g + v * VLEN);
            UNROLL_12 for (int j = 0; j < J; j++) {
                const float number = x[j];
                UNROLL for (int v = 0; v < V; v++) sums[j][v] += number * outputs[v];
            }
        }
    }
    UNROLL_12 for (int j = 0; j < J; j++) {
        UNROLL for (int v = 0; v < V; v++) STU(to + j * n_out + v * VLEN, sums[j][v]);
    }
}

/* sums [len][n_out] += as gradient_block */
INLINE void NAME(add_gradient)(const float *from, size_t row, size_t step, int len, const float *grad, size_t grad_row,
                               int n_out, int n_rows, int w, float *sums) {
    for (int output = 0; output < n_out;) {
        const int two = n_out - output >= 2 * VLEN;
        for (int j = 0; j < len;) {
            const int left = len - j;
            float *to = sums + (size_t)j * n_out + output;
#define BLOCK_OF(J, V) \
    (NAME(gradient_block)(J, V, from + j, row, step, grad + output, grad_row, n_out, n_rows, w, to), j += J)
            if (!two && left >= 12) BLOCK_OF(12, 1);
            else if (left >= 6 && left != 8 && two) BLOCK_OF(6, 2);
            else if (left >= 4 && two) BLOCK_OF(4, 2);
            else if (left >= 4) BLOCK_OF(4, 1);
            else if (two) BLOCK_OF(1, 2);
            else BLOCK_OF(1, 1);
#undef BLOCK_OF
        }
        output += two ? 2 * VLEN : VLEN;
    }
}

/* grad: the first pixel inside the border */
INLINE void NAME(add_bias_gradient)(const float *grad, int h, int w, int n_out, float *bias) {
    for (int k = 0; k < n_out; k += VLEN) {
        vec sum = LDU(bias + k);
        for (int y = 0; y < h; y++) {
            for (int x = 0; x < w; x++) sum += LDU(grad + ((size_t)y * (w + 2) + x) * n_out + k);
        }
        STU(bias + k, sum);
    }
}

/* Add the gradients of a convolution's weights, [rows][len][n_out], then of its bias; arguments as of convolve. */
static TARGET NOINLINE void NAME(add_conv_gradient)(const float *image, size_t row, int n_in, int stride, int rows, int len,
                                                    const float *grad, int h, int w, int n_out, float *sums) {
    const size_t grad_row = (size_t)(w + 2) * n_out;
    const int at_once = w < 64 ? 64 / w : 1; /* rows of pixels, as many as stay in the first cache */
    grad += grad_row + n_out;
    for (int y = 0; y < h; y += at_once) {
        const int n_rows = h - y < at_once ? h - y : at_once;
        for (int r = 0; r < rows; r++)
            NAME(add_gradient)(image + ((size_t)y * stride + r) * row, stride * row, (size_t)stride * n_in, len,
                               grad + y * grad_row, grad_row, n_out, n_rows, w, sums + (size_t)r * len * n_out);
    }
    NAME(add_bias_gradient)(grad, h, w, n_out, sums + (size_t)rows * len * n_out);
}

/* One of the four transforms, of a row or column */
INLINE void NAME(transform_row)(int kind, const vec *x, vec *y) {
    if (kind == FROM_INPUT) {
        const vec even = x[4] - 4 * x[2], odd = x[3] - 4 * x[1], even2 = x[4] - x[2], odd2 = 2 * (x[3] - x[1]);
        y[0] = 4 * x[0] - 5 * x[2] + x[4];
        y[1] = even + odd;
        y[2] = even - odd;
        y[3] = even2 + odd2;
        y[4] = even2 - odd2;
        y[5] = 4 * x[1] - 5 * x[3] + x[5];
    } else if (kind == TO_OUTPUT) {
        const vec even = x[1] + x[2], odd = x[1] - x[2], even2 = x[3] + x[4], odd2 = x[3] - x[4];
        y[0] = x[0] + even + even2;
        y[1] = odd + 2 * odd2;
        y[2] = even + 4 * even2;
        y[3] = odd + 8 * odd2 + x[5];
    } else if (kind == FROM_GRADIENT) {
        const vec even = x[0] + x[2], odd = x[1] + x[3], even2 = x[0] + 4 * x[2], odd2 = 2 * x[1] + 8 * x[3];
        y[0] = x[0];
        y[1] = even + odd;
        y[2] = even - odd;
        y[3] = even2 + odd2;
        y[4] = even2 - odd2;
        y[5] = x[3];
    } else {
        const vec even = (x[1] + x[2]) * (1.f / 6), odd = (x[2] - x[1]) * (1.f / 6);
        const vec even2 = (x[3] + x[4]) * (1.f / 24), odd2 = (x[3] - x[4]) * (1.f / 12);
        y[0] = x[0] * .25f - even + even2;
        y[1] = odd + odd2;
        y[2] = 4 * even2 - even + x[5];
    }
}

/* A vector of [n][n] tiles becomes one of [m][m], or is added to that; `row` and `column`: from one number to the next */
INLINE void NAME(transform)(int kind, const float *from, size_t row, size_t column, float *to, size_t to_row, size_t to_column) {
    const int n = kind == FROM_GRADIENT ? 4 : 6, m = kind == TO_OUTPUT ? 4 : kind == TO_WEIGHT ? 3 : 6;
    vec half[6][6];
    for (int j = 0; j < n; j++) {
        vec x[6], y[6];
        UNROLL for (int i = 0; i < n; i++) x[i] = LDU(from + i * row + j * column);
        NAME(transform_row)(kind, x, y);
        UNROLL for (int i = 0; i < m; i++) half[i][j] = y[i];
    }
    for (int i = 0; i < m; i++) {
        vec y[6];
        NAME(transform_row)(kind, half[i], y);
        UNROLL for (int j = 0; j < m; j++) {
            float *at = to + i * to_row + j * to_column;
            if (kind == TO_WEIGHT) STU(at, y[j] + LDU(at));
            else STU(at, y[j]);
        }
    }
}

/* Transform n tiles of an image, of 6 x 6 pixels or 4 x 4, from number `first` on of a row of `across`: [36][AT_ONCE][c] */
static TARGET NOINLINE void NAME(transform_tiles)(int kind, const float *image, int first, int n, int across, int c, float *to) {
    const size_t row = (size_t)(4 * across + 2) * c, plane = plane_of(AT_ONCE, c);
    for (int t = 0; t < n; t++) {
        const float *tile = image + (first + t) / across * 4 * row + (size_t)((first + t) % across) * 4 * c;
        for (int k = 0; k < c; k += VLEN) {
            if (kind == FROM_INPUT) NAME(transform)(FROM_INPUT, tile + k, row, c, to + t * c + k, 6 * plane, plane);
            else NAME(transform)(FROM_GRADIENT, tile + k, row, c, to + t * c + k, 6 * plane, plane);
        }
    }
}

/* As convolve, a kernel of 3 x 3, for height and width that are multiples of 4. weight: transformed, [36][n_in][n_out] */
static TARGET NOINLINE void NAME(convolve_tiles)(const float *image, int n_in, int h, int w, int n_out, const float *weight,
                                                 float *scratch, const NAME(after) *after) {
    const int across = w / 4, n_tiles = h / 4 * across;
    const NAME(after) local = *after; /* which no store can change */
    const size_t row = (size_t)(w + 2) * n_out, plane_in = plane_of(AT_ONCE, n_in), plane = plane_of(AT_ONCE, n_out);
    float *products = scratch + 36 * plane_in;
    for (int first = 0; first < n_tiles; first += AT_ONCE) {
        const int n = n_tiles - first < AT_ONCE ? n_tiles - first : AT_ONCE;
        NAME(transform_tiles)(FROM_INPUT, image, first, n, across, n_in, scratch);
        for (int place = 0; place < 36; place++) {
            const NAME(after) store = {0, 0, 0, products + place * plane, 0};
            const float *own = weight + (size_t)place * n_in * n_out;
            for (int output = 0; output < n_out;) {
                const int two = n_out - output >= 2 * VLEN;
                for (int t = 0; t < n;) {
                    const float *from = scratch + place * plane_in + (size_t)t * n_in;
#define BLOCK_OF(P, V) \
    (NAME(convolve_block)(P, V, from, 0, n_in, 1, n_in, own, n_out, (size_t)t * n_out, output, &store), t += P)
                    if (!two && n - t >= 12) BLOCK_OF(12, 1);
                    else if (two && n - t >= 6 && n - t != 8) BLOCK_OF(6, 2);
                    else if (two && n - t >= 4) BLOCK_OF(4, 2);
                    else if (n - t >= 4) BLOCK_OF(4, 1);
                    else if (two) BLOCK_OF(1, 2);
                    else BLOCK_OF(1, 1);
#undef BLOCK_OF
                }
                output += two ? 2 * VLEN : VLEN;
            }
        }
        for (int t = 0; t < n; t++) {
            const size_t at = ((first + t) / across * 4 + 1) * row + ((size_t)((first + t) % across) * 4 + 1) * n_out;
            for (int k = 0; k < n_out; k += VLEN) {
                float tile[16 * VLEN];
                NAME(transform)(TO_OUTPUT, products + t * n_out + k, 6 * plane, plane, tile, 4 * VLEN, VLEN);
                for (int i = 0; i < 4; i++) {
                    UNROLL for (int j = 0; j < 4; j++)
                        NAME(finish)(LDU(tile + (4 * i + j) * VLEN), at + i * row + j * n_out + k, k, &local);
                }
            }
        }
    }
}

/* As add_conv_gradient, a kernel of 3 x 3, for height and width that are multiples of 4 */
static TARGET NOINLINE void NAME(add_tiles_gradient)(const float *image, int n_in, const float *grad, int h, int w, int n_out,
                                                     float *scratch, float *sums) {
    const int across = w / 4, n_tiles = h / 4 * across;
    const size_t plane_in = plane_of(AT_ONCE, n_in), plane_out = plane_of(AT_ONCE, n_out), plane = plane_of(n_in, n_out);
    const size_t n_weights = (size_t)n_in * n_out;
    float *outputs = scratch + 36 * plane_in, *gradient = outputs + 36 * plane_out;
    memset(gradient, 0, 36 * plane * sizeof(float));
    grad += (size_t)(w + 3) * n_out;
    for (int first = 0; first < n_tiles; first += AT_ONCE) {
        const int n = n_tiles - first < AT_ONCE ? n_tiles - first : AT_ONCE;
        NAME(transform_tiles)(FROM_INPUT, image, first, n, across, n_in, scratch);
        NAME(transform_tiles)(FROM_GRADIENT, grad, first, n, across, n_out, outputs);
        for (int place = 0; place < 36; place++)
            NAME(add_gradient)(scratch + place * plane_in, 0, n_in, n_in, outputs + place * plane_out, 0, n_out, 1, n,
                               gradient + place * plane);
    }
    for (int i = 0; i < n_in; i++) {
        for (int k = 0; k < n_out; k += VLEN) {
            const size_t at = (size_t)i * n_out + k;
            NAME(transform)(TO_WEIGHT, gradient + at, 6 * plane, plane, sums + at, 3 * n_weights, n_weights);
        }
    }
    NAME(add_bias_gradient)(grad, h, w, n_out, sums + 9 * n_weights);
}

INLINE void NAME(rectify)(const float *from, float *to, size_t n) {
    for (size_t i = 0; i < n; i += VLEN) STU(to + i, VMAX(ZERO, LDU(from + i)));
}

/* The pooling of a layer's convolution, between images with borders */
static Pool NAME(pool_of)(const Layer *layer, float *x, float *y, unsigned char *which) {
    const Pool pool = {.h = layer->h_in, .w = layer->w_in, .c = layer->c, .which = which,
                       .x = x + ((size_t)layer->w_in + 3) * layer->c, .y = y + ((size_t)layer->w + 3) * layer->c,
                       .x_row = layer->w_in + 2, .y_row = layer->w + 2};
    return pool;
}

/* A convolution of 3 x 3, and its weights' gradient, as described by conv or turned round */
INLINE void NAME(convolve_3x3)(const FloatConv *conv, int back, const float *image, int h, int w, float *scratch,
                               const NAME(after) *after) {
    const int n_in = back ? conv->n_out : conv->n_in, n_out = back ? conv->n_in : conv->n_out;
    if (conv->by_tiles) NAME(convolve_tiles)(image, n_in, h, w, n_out, conv->weight, scratch, after);
    else NAME(convolve)(image, (size_t)(w + 2) * n_in, n_in, 1, 3, 3 * n_in, h, w, n_out, conv->weight, after);
}

INLINE void NAME(add_gradient_3x3)(const FloatConv *conv, const float *image, const float *grad, int h, int w, float *scratch,
                                   float *sums) {
    const int n_in = conv->n_in, n_out = conv->n_out;
    if (conv->gradient_by_tiles) NAME(add_tiles_gradient)(image, n_in, grad, h, w, n_out, scratch, sums + conv->sums);
    else NAME(add_conv_gradient)(image, (size_t)(w + 2) * n_in, n_in, 1, 3, 3 * n_in, grad, h, w, n_out, sums + conv->sums);
}

static TARGET void NAME(vector_forward)(const Cnn *cnn, const FloatThread *thread, const FloatKept *kept) {
    const FloatConv *convs = ((const FloatCnn *)cnn->prepared)->convs;
    const float *image = thread->frame, *total = 0;
    int n_totals = 0;
    for (int k = 0; k < cnn->n_layers; k++) {
        const Layer *layer = cnn->layers + k;
        const FloatConv *conv = convs + layer->conv;
        const float *const *bias = cnn->biases + layer->conv;
        const int h = layer->h, w = layer->w, c = layer->c, rectified = is_rectified(cnn, k);
        const FloatKept *own = kept + k;
        float *sum = rectified ? thread->totals[n_totals ^= 1] : own->out, *positive = rectified ? own->out : 0;
        clear_border(own->out, h, w, c);
        if (layer->kind == BLOCK) {
            const NAME(after) inner = {*bias, 0, 0, 0, own->inner}, outer = {bias[1], total, 0, sum, positive};
            clear_border(own->inner, h, w, c);
            NAME(convolve_3x3)(conv, 0, image, h, w, thread->scratch, &inner);
            NAME(convolve_3x3)(conv + 1, 0, own->inner, h, w, thread->scratch, &outer);
        } else if (layer->kind == PATCHES) {
            const NAME(after) after = {*bias, 0, 0, sum, positive};
            NAME(convolve)(image, (size_t)layer->w_in * layer->c_in, layer->c_in, layer->kernel, layer->kernel,
                           layer->kernel * layer->c_in, h, w, c, conv->weight, &after);
        } else {
            const NAME(after) after = {*bias, 0, 0, thread->inner, 0};
            NAME(convolve_3x3)(conv, 0, image, layer->h_in, layer->w_in, thread->scratch, &after);
            const Pool pool = NAME(pool_of)(layer, thread->inner, sum, own->which);
            for (int y = 0; y < h; y++) {
                NAME(max_pool_row)(&pool, 0, y, 0);
                const size_t at = ((size_t)(y + 1) * (w + 2) + 1) * c;
                if (rectified) NAME(rectify)(sum + at, own->out + at, (size_t)w * c);
            }
        }
        total = sum, image = own->out;
    }
}

static TARGET void NAME(vector_backward)(const Cnn *cnn, const FloatThread *thread, const FloatKept *kept, float *sums) {
    const FloatConv *convs = ((const FloatCnn *)cnn->prepared)->convs;
    float *grad = thread->grads[0], *inner = thread->inner, *other = thread->grads[1], *scratch = thread->scratch;
    for (int k = (int)cnn->n_layers - 1; k >= 0; k--) {
        const Layer *layer = cnn->layers + k;
        const FloatConv *conv = convs + layer->conv;
        const int h = layer->h, w = layer->w, c = layer->c, h_in = layer->h_in, w_in = layer->w_in, c_in = layer->c_in;
        const float *image = k ? kept[k - 1].out : thread->frame;
        if (layer->kind == BLOCK) {
            const NAME(after) first = {0, 0, kept[k].inner, inner, 0}, second = {0, grad, image, other, 0};
            NAME(add_gradient_3x3)(conv + 1, kept[k].inner, grad, h, w, scratch, sums);
            NAME(convolve_3x3)(conv + 1, 1, grad, h, w, scratch, &first);
            clear_border(inner, h, w, c);
            NAME(add_gradient_3x3)(conv, image, inner, h, w, scratch, sums);
            NAME(convolve_3x3)(conv, 1, inner, h, w, scratch, &second);
        } else if (layer->kind == PATCHES) {
            NAME(add_conv_gradient)(image, (size_t)w_in * c_in, c_in, layer->kernel, layer->kernel, layer->kernel * c_in,
                                    grad, h, w, c, sums + conv->sums);
        } else {
            const Pool pool = NAME(pool_of)(layer, inner, grad, kept[k].which);
            const NAME(after) after = {0, 0, 0, other, 0};
            for (int y = 0; y < h_in; y++) NAME(max_pool_row_backward)(&pool, 0, y, 0);
            NAME(add_gradient_3x3)(conv, image, inner, h_in, w_in, scratch, sums);
            if (!k) break;
            clear_border(inner, h_in, w_in, c);
            NAME(convolve_3x3)(conv, 1, inner, h_in, w_in, scratch, &after);
        }
        if (k) clear_border(other, h_in, w_in, c_in);
        float *swapped = grad;
        grad = other, other = swapped;
    }
}

static TARGET void NAME(vector_cnn_worker)(void *data) { vector_cnn_work(data, NAME(vector_forward), NAME(vector_backward)); }
