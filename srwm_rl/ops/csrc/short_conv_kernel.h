/* A causal depthwise convolution over the last W steps of each environment, in single precision. Every vector has the
 * channels of one step. Inputs from before the start of an episode count as 0.
 */

/* The number of taps that step `t` uses: 1 at the start of an episode, at most W */
INLINE int64_t NAME(taps_at)(const Conv *conv, int64_t t, int64_t batch) {
    int64_t n = 1;
    while (n < conv->W && !(t >= n - 1 && conv->starts[(t - n + 1) * conv->B + batch])) n++;
    return n;
}

/* The place of the input of step `t`, or below 0 of an earlier one, in x or state, or in their gradients */
INLINE int64_t NAME(place)(const Conv *conv, int64_t t, int64_t batch) {
    return (t >= 0 ? t * conv->B + batch : batch * (conv->W - 1) - t - 1) * conv->C;
}

static TARGET void NAME(short_conv_forward)(const Conv *conv) {
    const int64_t C = conv->C;
    for (int64_t t = 0; t < conv->T; t++) {
        for (int64_t batch = 0; batch < conv->B; batch++) {
            const int64_t n = NAME(taps_at)(conv, t, batch);
            const REAL *x = conv->x + NAME(place)(conv, t, batch);
            REAL *y = conv->y + NAME(place)(conv, t, batch);
            for (int64_t c = 0; c < C; c++) y[c] = conv->weight[c] * x[c];
            for (int64_t tap = 1; tap < n; tap++) {
                const REAL *weight = conv->weight + tap * C;
                const REAL *earlier = (t < tap ? conv->state : conv->x) + NAME(place)(conv, t - tap, batch);
                for (int64_t c = 0; c < C; c++) y[c] += weight[c] * earlier[c];
            }
        }
    }
    for (int64_t batch = 0; batch < conv->B; batch++) {
        const int64_t last = conv->T - 1, n = NAME(taps_at)(conv, last, batch);
        for (int64_t tap = 0; tap < conv->W - 1; tap++) {
            REAL *final = conv->final + (batch * (conv->W - 1) + tap) * C;
            const REAL *input = (last < tap ? conv->state : conv->x) + NAME(place)(conv, last - tap, batch);
            if (tap < n)
                memcpy(final, input, C * sizeof(REAL));
            else
                memset(final, 0, C * sizeof(REAL));
        }
    }
}

static TARGET void NAME(short_conv_backward)(const Conv *conv) {
    const int64_t C = conv->C;
    for (int64_t batch = 0; batch < conv->B; batch++) {
        for (int64_t t = 0; t < conv->T && conv->grad_y; t++) {
            const int64_t n = NAME(taps_at)(conv, t, batch);
            const REAL *grad = conv->grad_y + NAME(place)(conv, t, batch);
            for (int64_t tap = 0; tap < n; tap++) {
                const int64_t at = NAME(place)(conv, t - tap, batch);
                const REAL *weight = conv->weight + tap * C, *input = (t < tap ? conv->state : conv->x) + at;
                REAL *grad_weight = conv->grad_weight + tap * C;
                REAL *grad_input = (t < tap ? conv->grad_state : conv->grad_x) + at;
                for (int64_t c = 0; c < C; c++) {
                    grad_weight[c] += grad[c] * input[c];
                    grad_input[c] += grad[c] * weight[c];
                }
            }
        }
        const int64_t last = conv->T - 1, n = NAME(taps_at)(conv, last, batch);
        for (int64_t tap = 0; tap < conv->W - 1 && tap < n && conv->grad_final; tap++) {
            const REAL *grad = conv->grad_final + (batch * (conv->W - 1) + tap) * C;
            REAL *grad_input = (last < tap ? conv->grad_state : conv->grad_x) + NAME(place)(conv, last - tap, batch);
            for (int64_t c = 0; c < C; c++) grad_input[c] += grad[c];
        }
    }
}
