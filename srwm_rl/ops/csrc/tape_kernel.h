/* One step of a small network for many environments: a list of operations, run over 64 environments at a time;
 * srwm_kernel.h includes this for single precision and lends it its tools.
 *
 * A tile's numbers are [rows][TILE]: a row is one feature of 64 environments. So every operation goes along whole
 * vectors, weights are read as torch keeps them, and nothing is summed across a vector's lanes.
 */

#define LINEAR_VECS (VLEN == 16 ? 4 : VLEN == 1 ? 1 : 2)
#define LINEAR_ROWS (VLEN == 16 ? 6 : 4) /* x LINEAR_VECS sums and one row of vectors: what the registers hold */
#define EACH(c) for (int c = 0; c < TILE; c += VLEN)

/* Max last argument first: where that is not a number, so is the result. */
INLINE vec NAME(activated)(vec x, int activation) {
    switch (activation) {
        case RELU: return VMAX(ZERO, x);
        case SIGMOID: return NAME(sigmoid)(x);
        case TANH: {
            vec two = NAME(sigmoid)(x + x);
            return two + two - 1;
        }
        default: return x;
    }
}

/* out[r] = activation(bias[r] + sum_i weight[r][i] in[i]) + add[r], for LINEAR_VECS vectors of each row */
INLINE void NAME(linear_block)(const Op *op, int rows, int row, const REAL *in, const REAL *add, REAL *out) {
    vec sum[LINEAR_ROWS][LINEAR_VECS];
    const int n = op->n_in;
    const REAL *weight = op->weight + (size_t)row * n;
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < LINEAR_VECS; v++) sum[r][v] = ZERO + (op->bias ? op->bias[row + r] : 0);
    }
    for (int i = 0; i < n; i++) {
        vec x[LINEAR_VECS];
        UNROLL for (int v = 0; v < LINEAR_VECS; v++) x[v] = LD(in + (size_t)i * TILE + v * VLEN);
        UNROLL for (int r = 0; r < rows; r++) {
            UNROLL for (int v = 0; v < LINEAR_VECS; v++) sum[r][v] += x[v] * weight[(size_t)r * n + i];
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < LINEAR_VECS; v++) {
            const size_t at = (size_t)(row + r) * TILE + v * VLEN;
            vec y = NAME(activated)(sum[r][v], op->activation);
            if (add) y += LD(add + at);
            ST(out + at, y);
        }
    }
}

static TARGET void NAME(linear)(const Op *op, const REAL *in, const REAL *add, REAL *out) {
    for (int c = 0; c < TILE; c += LINEAR_VECS * VLEN) {
        int row = 0;
#define CALL(rows) NAME(linear_block)(op, rows, row, in + c, add ? add + c : 0, out + c)
        for (; row + LINEAR_ROWS <= op->n_out; row += LINEAR_ROWS) CALL(LINEAR_ROWS);
        for (; row + 2 <= op->n_out; row += 2) CALL(2);
        if (row < op->n_out) CALL(1);
#undef CALL
    }
}

static TARGET void NAME(norm)(const Op *op, const REAL *in, REAL *out) {
    ALIGNED REAL scale[TILE], mean[TILE];
    EACH(c) {
        vec sum = ZERO, squares = ZERO;
        for (int i = 0; i < op->n_in; i++) sum += LD(in + (size_t)i * TILE + c);
        sum /= (REAL)op->n_in;
        for (int i = 0; i < op->n_in; i++) {
            vec d = LD(in + (size_t)i * TILE + c) - sum;
            squares += d * d;
        }
        ST(mean + c, sum);
        ST(scale + c, squares / (REAL)op->n_in + op->number);
    }
    for (int c = 0; c < TILE; c++) scale[c] = 1 / sqrtf(scale[c]);
    for (int i = 0; i < op->n_in; i++) {
        EACH(c) {
            vec y = (LD(in + (size_t)i * TILE + c) - LD(mean + c)) * LD(scale + c);
            ST(out + (size_t)i * TILE + c, y * op->weight[i] + op->bias[i]);
        }
    }
}

/* The softmax of each `group` rows. */
static TARGET void NAME(softmax)(int n, int group, const REAL *in, REAL *out) {
    for (int first = 0; first < n; first += group) {
        const REAL *from = in + (size_t)first * TILE;
        REAL *to = out + (size_t)first * TILE;
        EACH(c) {
            vec most = LD(from + c), sum = ZERO;
            for (int i = 1; i < group; i++) most = VMAX(most, LD(from + (size_t)i * TILE + c));
            for (int i = 0; i < group; i++) {
                vec e = NAME(exp)(LD(from + (size_t)i * TILE + c) - most);
                ST(to + (size_t)i * TILE + c, e);
                sum += e;
            }
            for (int i = 0; i < group; i++) ST(to + (size_t)i * TILE + c, LD(to + (size_t)i * TILE + c) / sum);
        }
    }
}

/* Draw choices by an exponential race, as Choice.sample does: `clocks` are exponentially distributed. */
static TARGET void NAME(choose)(const Op *op, const REAL *logits, const REAL *clocks, int64_t *choices,
                                REAL *log_probs, int n) {
    for (int c = 0; c < n; c++) {
        REAL most = logits[c], sum = 0, best = 0, chosen = 0;
        int64_t winner = -1;
        for (int i = 1; i < op->n_in; i++) most = logits[i * TILE + c] > most ? logits[i * TILE + c] : most;
        for (int i = 0; i < op->n_in; i++) sum += expf(logits[i * TILE + c] - most);
        const REAL all = most + logf(sum);
        for (int i = 0; i < op->n_in; i++) {
            REAL log_p = logits[i * TILE + c] - all, ahead = log_p - logf(clocks[i * TILE + c]);
            if (winner < 0 || ahead > best) winner = i, best = ahead, chosen = log_p;
        }
        choices[c] = winner;
        log_probs[c] = chosen;
    }
}

/* [n, width] to [width][TILE], the rest of the tile 0; and back */
INLINE void NAME(turn_in)(const REAL *from, int n, int width, REAL *to) {
    for (int i = 0; i < width; i++) {
        for (int c = 0; c < n; c++) to[(size_t)i * TILE + c] = from[(size_t)c * width + i];
        for (int c = n; c < TILE; c++) to[(size_t)i * TILE + c] = 0;
    }
}

INLINE void NAME(turn_out)(const REAL *from, int n, int width, REAL *to) {
    for (int i = 0; i < width; i++) {
        for (int c = 0; c < n; c++) to[(size_t)c * width + i] = from[(size_t)i * TILE + c];
    }
}

/* A layer's heads: one step of the recurrence, whose kernel wants [n, H, D]. Return 1 if there was no memory. */
static TARGET int NAME(heads)(const Tape *tape, const Op *op, REAL *rows, REAL *spare, int64_t first, int n) {
    const int H = op->n_out, D = op->n_in / H;
    const int64_t state = (int64_t)op->n_in * (3 * D + 4), at = (op->index * tape->B + first) * state;
    REAL *x = spare, *y = x + (size_t)op->n_in * TILE, *kept = y + (size_t)op->n_in * TILE;
    NAME(turn_out)(rows + (size_t)op->from * TILE, n, op->n_in, x);
    if (op->add >= 0) NAME(turn_out)(rows + (size_t)op->add * TILE, n, H, kept);
    Job job = {.T = 1, .B = n, .H = H, .D = D, .E = D, .grain = (int64_t)n * H};
    job.bound = op->number;
    job.x = x, job.weight = op->weight, job.shift = tape->state + at, job.starts = tape->starts + first;
    job.y = y, job.final = tape->final + at;
    job.retention = op->add >= 0 ? kept : 0;
    choose(0, tape->level, D)(&job);
    NAME(turn_in)(y, n, op->n_in, rows + (size_t)op->to * TILE);
    return job.failed;
}

static TARGET int NAME(play_tile)(const Tape *tape, REAL *rows, int64_t first, int n) {
    REAL *spare = rows + (size_t)tape->n_rows * TILE;
    for (const Op *op = tape->ops; op < tape->ops + tape->n_ops; op++) {
        REAL *from = rows + (size_t)op->from * TILE, *to = rows + (size_t)op->to * TILE;
        REAL *add = op->add >= 0 ? rows + (size_t)op->add * TILE : 0;
        switch (op->kind) {
            case TAKE_INPUT: NAME(turn_in)(tape->inputs[op->index] + first * op->n_out, n, op->n_out, to); break;
            case GIVE_OUTPUT: NAME(turn_out)(from, n, op->n_in, tape->outputs[op->index] + first * op->n_in); break;
            case LINEAR: NAME(linear)(op, from, add, to); break;
            case NORM: NAME(norm)(op, from, to); break;
            case SOFTMAX: NAME(softmax)(op->n_in, op->n_out, from, to); break;
            case SINES:
                for (int i = 0; i < op->n_out; i++) {
                    for (int c = 0; c < TILE; c++) {
                        REAL angle = 6.283185307179586f * from[c] / op->weight[i];
                        to[i * TILE + c] = sinf(angle), to[(op->n_out + i) * TILE + c] = cosf(angle);
                    }
                }
                break;
            case HEADS:
                if (NAME(heads)(tape, op, rows, spare, first, n)) return 1;
                break;
            case CHOOSE:
                NAME(choose)(op, from, add, tape->choices + first, tape->outputs[op->index] + first, n);
                break;
        }
    }
    return 0;
}

/* Take tiles until none is left. */
static TARGET void NAME(play)(void *data) {
    Tape *tape = (Tape *)data;
    const size_t size = ((size_t)tape->n_rows + tape->n_spare) * TILE * sizeof(REAL);
    void *block = malloc(size + 64);
    if (!block) {
        tape->failed = 1;
        return;
    }
    REAL *rows = (REAL *)(((uintptr_t)block + 63) / 64 * 64);
    for (int64_t tile; (tile = TAKE(tape)) * TILE < tape->B;) {
        const int64_t first = tile * TILE, left = tape->B - first;
        if (NAME(play_tile)(tape, rows, first, left < TILE ? (int)left : TILE)) tape->failed = 1;
    }
    free(block);
}

#undef LINEAR_VECS
#undef LINEAR_ROWS
#undef EACH
