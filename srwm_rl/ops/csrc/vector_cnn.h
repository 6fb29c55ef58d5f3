/* What all versions of vector_cnn_kernel.h share: a thread's memory, and the order of weights. */

enum { AT_ONCE = 32 }; /* tiles that are transformed at once */
enum { MOST_SIDE_BY_SIDE = 12 }; /* pixels, or numbers of a row: with two vectors each, half as many */
enum { FROM_INPUT, TO_OUTPUT, FROM_GRADIENT, TO_WEIGHT }; /* Winograd's transforms: B', A', A and G' */

/* A convolution's weight as [rows][what a row of the kernel covers][n_out], or transformed for tiles, [36][n_in][n_out]; in
 * backward that of its input's gradient, a convolution with the kernel turned round, from n_out to n_in; and where its sums
 * begin: those of the weight in the first order, then [n_out] */
typedef struct {
    int n_in, n_out, kernel, by_tiles, gradient_by_tiles;
    float *weight;
    size_t sums;
} FloatConv;

/* What backward needs of a layer's frame: the first convolution's output in a block, rectified, and the layer's, rectified
 * unless a convolution follows; and which pixel each pooling window took */
typedef struct {
    float *inner, *out;
    unsigned char *which;
} FloatKept;

/* A thread's images: the frame; a sum for the skip connection and the one before; a convolution's output before pooling, or
 * its gradient, or that inside a block; gradients; and the transformed tiles */
typedef struct {
    float *frame, *totals[2], *inner, *grads[2], *scratch;
} FloatThread;

typedef struct {
    FloatConv *convs;
    size_t n_sums, n_kept; /* of a share; of a frame */
    float *sums;
} FloatCnn;

/* Whether a layer's output is kept rectified: a block follows, or nothing */
static int is_rectified(const Cnn *cnn, int k) { return k + 1 == cnn->n_layers || cnn->layers[k + 1].kind == BLOCK; }

/* From one of the 36 matrices of transformed numbers to the next: no power of two, which would map all of them to a few
 * lines of the cache */
static size_t plane_of(int rows, int columns) { return (size_t)rows * columns + LANES; }

static size_t float_image(int h, int w, int c) { return ((size_t)(h + 2) * (w + 2) * c + LANES - 1) / LANES * LANES; }

static void clear_border(float *image, int h, int w, int c) {
    const size_t row = (size_t)(w + 2) * c;
    memset(image, 0, row * sizeof(float));
    memset(image + (h + 1) * row, 0, row * sizeof(float));
    for (int y = 1; y <= h; y++) {
        memset(image + y * row, 0, c * sizeof(float));
        memset(image + (y + 1) * row - c, 0, c * sizeof(float));
    }
}

/* Set what is kept of a frame, from `at` on unless it is NULL; return the number of floats. */
static size_t lay_out_kept(const Cnn *cnn, FloatKept *kept, float *at) {
    size_t size = 0;
    for (int k = 0; k < cnn->n_layers; k++) {
        const Layer *layer = cnn->layers + k;
        const size_t n = float_image(layer->h, layer->w, layer->c);
        if (at) kept[k] = (FloatKept){at + size + n, at + size, (unsigned char *)(at + size + n)};
        size += layer->kind == BLOCK ? 2 * n : layer->kind == CONV_AND_POOL ? n + n / 4 : n;
    }
    return size;
}

/* Set a thread's images from `at` on unless it is NULL; return the number of floats. */
static size_t lay_out_thread(const Cnn *cnn, FloatThread *thread, float *at) {
    const Layer *first = cnn->layers;
    size_t largest = 0, inner = 0, scratch = 0;
    for (const Layer *layer = first; layer < first + cnn->n_layers; layer++) {
        const size_t n = float_image(layer->h, layer->w, layer->c), in = float_image(layer->h_in, layer->w_in, layer->c);
        const size_t images = plane_of(AT_ONCE, layer->c_in) + plane_of(AT_ONCE, layer->c);
        const size_t tiles = 36 * (images + plane_of(layer->c_in, layer->c));
        largest = largest > n ? largest : n;
        inner = inner > n ? inner : n;
        if (layer->kind == CONV_AND_POOL && inner < in) inner = in;
        scratch = scratch > tiles ? scratch : tiles;
    }
    const size_t frame = float_image(first->h_in, first->w_in, first->c_in), n_grads = cnn->grad_y ? 2 : 0;
    if (at) {
        *thread = (FloatThread){at, {at + frame, at + frame + largest}, at + frame + 2 * largest, {0}, 0};
        for (size_t i = 0; i < n_grads; i++) thread->grads[i] = thread->inner + inner + i * largest;
        thread->scratch = thread->inner + inner + n_grads * largest;
    }
    return frame + (2 + n_grads) * largest + inner + scratch;
}

/* A frame as an image: with a border, unless it is cut into patches */
static void load_float_frame(const Layer *first, const uint8_t *bytes, float *image) {
    const int border = first->kind == CONV_AND_POOL;
    const size_t n = (size_t)first->w_in * first->c_in, row = n + 2 * border * first->c_in;
    if (border) clear_border(image, first->h_in, first->w_in, first->c_in);
    for (int y = 0; y < first->h_in; y++) {
        float *to = image + (y + border) * row + border * first->c_in;
        for (size_t i = 0; i < n; i++) to[i] = bytes[y * n + i];
    }
}

/* The rectified last output, channels first; or its gradient, where it is positive, channels last and with a border */
static void store_float_output(const Layer *last, const float *out, float *y) {
    for (int k = 0; k < last->c; k++) {
        for (int i = 0; i < last->h; i++) {
            for (int j = 0; j < last->w; j++) *y++ = out[((size_t)(i + 1) * (last->w + 2) + j + 1) * last->c + k];
        }
    }
}

static void load_float_gradient(const Layer *last, const float *out, const float *grad_y, float *grad) {
    clear_border(grad, last->h, last->w, last->c);
    for (int k = 0; k < last->c; k++) {
        for (int i = 0; i < last->h; i++) {
            for (int j = 0; j < last->w; j++, grad_y++) {
                const size_t at = ((size_t)(i + 1) * (last->w + 2) + j + 1) * last->c + k;
                grad[at] = out[at] <= 0 ? 0 : *grad_y;
            }
        }
    }
}

/* Take shares of frames until none is left. */
static void vector_cnn_work(Cnn *cnn, void (*forward)(const Cnn *, const FloatThread *, const FloatKept *),
                            void (*backward)(const Cnn *, const FloatThread *, const FloatKept *, float *)) {
    const FloatCnn *prepared = cnn->prepared;
    const Layer *first = cnn->layers, *last = first + cnn->n_layers - 1;
    const size_t n_in = (size_t)first->h_in * first->w_in * first->c_in, n_out = (size_t)last->h * last->w * last->c;
    const size_t own = lay_out_thread(cnn, 0, 0);
    FloatKept kept[MOST_LAYERS];
    FloatThread thread;
    float *block = calloc(own + (cnn->kept ? 0 : prepared->n_kept) + LANES, sizeof(float));
    if (!block) {
        cnn->failed = 1;
        return;
    }
    float *at = (float *)ALIGN(block);
    lay_out_thread(cnn, &thread, at);
    for (int64_t share; (share = TAKE(cnn)) < cnn->n_shares;) {
        const int64_t end = cnn->n * (share + 1) / cnn->n_shares;
        for (int64_t i = cnn->n * share / cnn->n_shares; i < end; i++) {
            lay_out_kept(cnn, kept, cnn->kept ? cnn->kept + i * prepared->n_kept : at + own);
            load_float_frame(first, cnn->frames + i * n_in, thread.frame);
            const float *out = kept[cnn->n_layers - 1].out;
            if (cnn->grad_y) {
                load_float_gradient(last, out, (const float *)cnn->grad_y + i * n_out, thread.grads[0]);
                backward(cnn, &thread, kept, prepared->sums + share * prepared->n_sums);
            } else {
                forward(cnn, &thread, kept);
                store_float_output(last, out, (float *)cnn->y + i * n_out);
            }
        }
    }
    free(block);
}

static size_t n_weights(const FloatConv *conv) { return (size_t)conv->kernel * conv->kernel * conv->n_in * conv->n_out; }

static size_t n_stored(const FloatConv *conv) { return conv->by_tiles ? n_weights(conv) * 4 : n_weights(conv); }

/* Set the convolutions' sizes; return the numbers of all their sums. */
static size_t describe_float(const Cnn *cnn, FloatConv *convs) {
    size_t n = 0;
    for (const Layer *layer = cnn->layers; layer < cnn->layers + cnn->n_layers; layer++) {
        for (int i = 0; i <= (layer->kind == BLOCK); i++) {
            FloatConv *conv = convs + layer->conv + i;
            *conv = (FloatConv){.n_in = layer->c_in, .n_out = layer->c, .kernel = layer->kernel, .sums = n};
            /* With few tiles, transforming the weights and their gradient takes longer than tiles save. */
            const int is_tiled = layer != cnn->layers && layer->h_in % 4 == 0 && layer->w_in % 4 == 0;
            conv->by_tiles = is_tiled && layer->h_in * layer->w_in >= 4 * 16;
            conv->gradient_by_tiles = is_tiled && layer->h_in * layer->w_in >= 8 * 16;
            n += n_weights(conv) + conv->n_out;
        }
    }
    return n;
}

/* y = G x: Winograd's transform of a row or column of LANES kernels; `stride` from one number to the next */
static void transform_weights(const float *restrict x, size_t stride, float *restrict y, size_t to_stride) {
    for (int l = 0; l < LANES; l++) {
        const float first = x[l], second = x[stride + l], third = x[2 * stride + l];
        const float even = (first + third) / -6, odd = second / 6;
        const float even2 = first / 24 + third / 6, odd2 = second / 12;
        const float all[6] = {first / 4, even - odd, even + odd, even2 + odd2, even2 - odd2, third};
        for (int i = 0; i < 6; i++) y[i * to_stride + l] = all[i];
    }
}

/* Transform `plane` kernels: their nine numbers are the last nine of 36 planes at `weight`. */
static void transform_kernels(float *weight, size_t plane) {
    for (size_t at = 0; at < plane; at += LANES) {
        float half[3][6][LANES];
        for (int i = 0; i < 3; i++) transform_weights(weight + (27 + 3 * i) * plane + at, plane, half[i][0], LANES);
        for (int j = 0; j < 6; j++) transform_weights(half[0][j], 6 * LANES, weight + j * plane + at, 6 * plane);
    }
}

/* Order a convolution's weight, [n_out][n_in][k][k]; back: turned round, from outputs to inputs. */
static void order_weight(const FloatConv *conv, int back, const float *weight, float scale) {
    const int taps = conv->kernel * conv->kernel, n_in = conv->n_in, n_out = conv->n_out;
    const size_t plane = (size_t)n_in * n_out;
    float *to = conv->weight + (conv->by_tiles ? 27 * plane : 0);
    for (int o = 0; o < n_out; o++) {
        for (int i = 0; i < n_in; i++, weight += taps) {
            const size_t at = back ? (size_t)o * n_in + i : (size_t)i * n_out + o;
            for (int tap = 0; tap < taps; tap++) to[tap * plane + at] = weight[back ? taps - 1 - tap : tap] * scale;
        }
    }
    if (conv->by_tiles) transform_kernels(conv->weight, plane);
}

/* Add up the shares, always in the same order. */
static void reduce_float(const Cnn *cnn, const FloatCnn *prepared) {
    for (int number = 0; number < cnn->n_convs; number++) {
        const FloatConv *conv = prepared->convs + number;
        const int taps = conv->kernel * conv->kernel, n_in = conv->n_in, n_out = conv->n_out;
        float *sums = prepared->sums + conv->sums;
        for (int64_t share = 1; share < cnn->n_shares; share++) {
            const float *from = sums + share * prepared->n_sums;
            for (size_t i = 0; i < n_weights(conv) + n_out; i++) sums[i] += from[i];
        }
        for (int o = 0; o < n_out; o++) {
            for (int i = 0; i < n_in; i++) {
                for (int tap = 0; tap < taps; tap++)
                    cnn->grad_weights[number][((size_t)o * n_in + i) * taps + tap] =
                        sums[((size_t)tap * n_in + i) * n_out + o] * (number ? 1 : cnn->scale);
            }
            cnn->grad_biases[number][o] = sums[n_weights(conv) + o];
        }
    }
}

/* Order the weights, run a worker, and add up the gradients. Return 1 without memory. */
static int run_vector_cnn(Cnn *cnn, Worker worker, unsigned threads, Parallel parallel) {
    const int back = cnn->grad_y != 0;
    FloatCnn prepared = {.convs = calloc(cnn->n_convs, sizeof(FloatConv))};
    if (!prepared.convs) return 1;
    prepared.n_sums = describe_float(cnn, prepared.convs);
    prepared.n_kept = lay_out_kept(cnn, 0, 0);
    /* The number of shares, and so the gradients' last bits, depends on the sizes alone. */
    const int64_t shares = (cnn->n + (back ? 31 : 7)) / (back ? 32 : 8), most = MOST_SUMS / (int64_t)prepared.n_sums + 1;
    cnn->n_shares = back && shares > most ? most : shares;
    cnn->grain = 1;
    cnn->next = cnn->failed = 0;
    cnn->prepared = &prepared;
    size_t size = 0;
    for (int i = 0; i < cnn->n_convs; i++) size += n_stored(prepared.convs + i);
    float *weights = malloc((size + LANES) * sizeof(float));
    prepared.sums = back ? calloc(cnn->n_shares * prepared.n_sums + LANES, sizeof(float)) : 0;
    cnn->failed = !weights || (back && !prepared.sums);
    if (!cnn->failed) {
        float *at = weights;
        for (int i = 0; i < cnn->n_convs; i++) {
            FloatConv *conv = prepared.convs + i;
            conv->weight = at, at += n_stored(conv);
            if (i || !back) order_weight(conv, back, cnn->weights[i], i ? 1 : cnn->scale);
        }
        run_parallel(worker, cnn, threads, parallel);
        if (back && !cnn->failed) reduce_float(cnn, &prepared);
    }
    free(prepared.convs);
    free(weights);
    free(prepared.sums);
    return cnn->failed;
}
