"""The GPU backend of `delta_scan`: one Triton launch forward and one backward, a program for each (batch, head) pair.

W `[D, D]` stays in registers for the whole unroll. What a step reads from memory is loaded during the step before it.
Backward recomputes a chunk at a time and undoes the edits in reverse; see README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from srwm_rl.ops.registration import CHUNK, DELTA_INPUTS, delta_widths, new_gradients, new_outputs, register_scan
from srwm_rl.ops.triton_launch import contiguous_or, device_of, padded
from srwm_rl.ops.triton_step import load_row

# mypy: disable-error-code="no-untyped-def, untyped-decorator"


@triton.jit
def _tile(base, D: tl.constexpr, N: tl.constexpr):
    """Load a `[D, D]` matrix, zero beyond D."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    return tl.load(base + i * D + j, mask=(i < D) & (j < D), other=0.0)


@triton.jit
def _store_tile(base, matrix, D: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(base + i * D + j, matrix, mask=(i < D) & (j < D))


@triton.jit(do_not_specialize=["T", "B", "H"])  # a batch of 1 is a number like any other
def _forward_kernel(
    key, value, query, rate, weight, starts, y_ptr, final, checkpoints, T, B, H,
    D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, WEIGHT: tl.constexpr, STARTS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    pairs, batch = B.to(tl.int64) * H, pair // H
    j = tl.arange(0, N)
    w = tl.zeros((N, N), tl.float32)
    if WEIGHT:
        w = _tile(weight + pair * D * D, D, N)
    next_k, next_v, next_q = load_row(key, pair, D, N), load_row(value, pair, D, N), load_row(query, pair, D, N)
    next_rate, next_start = tl.load(rate + pair), 0
    if STARTS:
        next_start = tl.load(starts + batch).to(tl.int32)
    for t in range(0, T):
        k, v, q, beta, start = next_k, next_v, next_q, next_rate, next_start
        following = tl.minimum(t + 1, T - 1)  # the last step loads itself again
        at = following * pairs + pair
        next_k, next_v, next_q = load_row(key, at, D, N), load_row(value, at, D, N), load_row(query, at, D, N)
        next_rate = tl.load(rate + at)
        if STARTS:
            next_start = tl.load(starts + following * B.to(tl.int64) + batch).to(tl.int32)
            w = tl.where(start != 0, 0.0, w)  # selected, not multiplied: the old episode's may be infinite
        if KEEP:  # noqa: SIM102 - known when compiled
            if (t > 0) & (t % CHUNK == 0):
                _store_tile(checkpoints + ((t // CHUNK - 1) * pairs + pair) * D * D, w, D, N)
        e = beta * (v - tl.sum(k[:, None] * w, 0))
        # q W' = q W + (q . k) e: both reads are of the old matrix, and do not wait for one another.
        y = tl.sum(q[:, None] * w, 0) + tl.sum(q * k, 0) * e
        tl.store(y_ptr + (t * pairs + pair) * D + j, y, mask=j < D)
        w += k[:, None] * e[None, :]
    _store_tile(final + pair * D * D, w, D, N)


@triton.jit(do_not_specialize=["T", "B", "H"])
def _backward_kernel(
    key, value, query, rate, weight, starts, checkpoints, grad_y, grad_final, grad_key, grad_value, grad_query,
    grad_rate, grad_weight, differences, T, B, H,
    D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, WEIGHT: tl.constexpr, STARTS: tl.constexpr,
    GRAD_Y: tl.constexpr, GRAD_FINAL: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    pairs, batch = B.to(tl.int64) * H, pair // H
    j, steps = tl.arange(0, N), tl.arange(0, CHUNK)
    g = tl.zeros((N, N), tl.float32)  # the gradient of W
    if GRAD_FINAL:
        g = _tile(grad_final + pair * D * D, D, N)
    record = differences + pair * (CHUNK * N)  # d = v - k W of the span's steps
    end = T
    while end > 0:
        chunk = (end - 1) // CHUNK
        begin = chunk * CHUNK
        reset = begin < 0
        if STARTS:  # the span begins at the chunk's last reset, if there is one
            of_chunk = begin + steps
            flags = tl.load(starts + of_chunk * B.to(tl.int64) + batch, mask=of_chunk < end, other=0)
            begin = tl.max(tl.where(flags != 0, of_chunk, begin), 0)
            reset = tl.max(tl.where((flags != 0) & (of_chunk == begin), 1, 0), 0) > 0
        w = tl.zeros((N, N), tl.float32)
        if (begin > 0) & (reset == 0):
            w = _tile(checkpoints + ((chunk - 1) * pairs + pair) * D * D, D, N)
        if WEIGHT:  # noqa: SIM102 - known when compiled
            if (begin == 0) & (reset == 0):
                w = _tile(weight + pair * D * D, D, N)
        first, last = begin * pairs + pair, (end - 1) * pairs + pair
        next_k, next_v, next_rate = load_row(key, first, D, N), load_row(value, first, D, N), tl.load(rate + first)
        for t in range(begin, end):
            k, v, beta = next_k, next_v, next_rate
            at = tl.minimum(t + 1, end - 1) * pairs + pair
            next_k, next_v, next_rate = load_row(key, at, D, N), load_row(value, at, D, N), tl.load(rate + at)
            d = v - tl.sum(k[:, None] * w, 0)
            tl.store(record + (t - begin) * N + j, d)
            w += k[:, None] * (beta * d)[None, :]
        tl.debug_barrier()  # other threads read the records
        next_k, next_q, next_rate = load_row(key, last, D, N), load_row(query, last, D, N), tl.load(rate + last)
        next_d = tl.load(record + (end - 1 - begin) * N + j)
        next_y = next_d * 0
        if GRAD_Y:
            next_y = load_row(grad_y, last, D, N)
        for n in range(0, end - begin):
            t = end - 1 - n
            k, q, beta, d, gy = next_k, next_q, next_rate, next_d, next_y
            before = tl.maximum(t - 1, begin)
            at = before * pairs + pair
            next_k, next_q, next_rate = load_row(key, at, D, N), load_row(query, at, D, N), tl.load(rate + at)
            next_d = tl.load(record + (before - begin) * N + j)
            here = t * pairs + pair
            e = beta * d
            if GRAD_Y:
                next_y = load_row(grad_y, at, D, N)
                tl.store(grad_query + here * D + j, tl.sum(w * gy[None, :], 1), mask=j < D)
                g += q[:, None] * gy[None, :]
            else:
                tl.store(grad_query + here * D + j, q * 0, mask=j < D)
            w -= k[:, None] * e[None, :]
            ge = tl.sum(k[:, None] * g, 0)
            gv = beta * ge
            gk = tl.sum(g * e[None, :] - w * gv[None, :], 1)
            tl.store(grad_value + here * D + j, gv, mask=j < D)
            tl.store(grad_key + here * D + j, gk, mask=j < D)
            tl.store(grad_rate + here, tl.sum(ge * d, 0))
            g -= k[:, None] * gv[None, :]
        tl.debug_barrier()  # the next span overwrites the records
        if reset:
            g = tl.zeros((N, N), tl.float32)
        end = begin
    if WEIGHT:
        _store_tile(grad_weight + pair * D * D, g, D, N)


def forward(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    rate: Tensor,
    weight: Tensor | None,
    starts: Tensor | None,
    bound: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `y`, the final fast weight and, with `keep`, the fast weight at every `CHUNK`-th step for `backward`."""
    key, value, query, rate = (tensor.contiguous() for tensor in (key, value, query, rate))
    n_steps, batch, heads, size = key.shape
    y, final, checkpoints = new_outputs(key, size, size, keep)
    with device_of(key):
        _forward_kernel[(batch * heads,)](
            key, value, query, rate, contiguous_or(weight, key), contiguous_or(starts, key), y, final, checkpoints,
            n_steps, batch, heads, WEIGHT=weight is not None, STARTS=starts is not None, KEEP=keep,
            **launch_sizes(size),
        )  # fmt: skip
    return y, final, checkpoints


def backward(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    rate: Tensor,
    weight: Tensor | None,
    starts: Tensor | None,
    bound: float | None,
    checkpoints: Tensor,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of `key`, `value`, `query`, `rate` and `weight` (empty if there was none)."""
    key, value, query, rate = (tensor.contiguous() for tensor in (key, value, query, rate))
    n_steps, batch, heads, size = key.shape
    gradients = new_gradients((key, value, query, rate, weight))
    of_size = launch_sizes(size)
    differences = key.new_empty(batch * heads, CHUNK, of_size["N"])
    with device_of(key):
        _backward_kernel[(batch * heads,)](
            key, value, query, rate, contiguous_or(weight, key), contiguous_or(starts, key), checkpoints,
            contiguous_or(grad_y, key), contiguous_or(grad_final, key), *gradients, differences, n_steps, batch, heads,
            WEIGHT=weight is not None, STARTS=starts is not None, GRAD_Y=grad_y is not None,
            GRAD_FINAL=grad_final is not None, **of_size,
        )  # fmt: skip
    return tuple(gradients)


def launch_sizes(size: int) -> dict[str, int]:
    """Return the kernels' compile-time sizes and warps for heads of `size`."""
    tile = padded(size)
    return {"D": size, "N": tile, "CHUNK": CHUNK, "num_warps": 4 if tile == 64 else 1}


delta_scan = register_scan("delta_triton", DELTA_INPUTS, delta_widths, forward, backward)
