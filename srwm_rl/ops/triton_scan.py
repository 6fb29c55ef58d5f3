"""The GPU backend: one Triton launch forward and one backward, a program for each (batch, head) pair.

W stays in registers for the whole unroll, as four tiles y `[D, E]`, q, k `[D, D]` and beta `[D, 4]`. Backward
recomputes a chunk at a time and undoes the edits in reverse (with a retention or a bound it stores the chunk's shifts
instead); see README.md. What a step reads from memory is loaded during the step before it. If TRITON_INTERPRET=1 is set
before the import, it runs on the CPU, for the tests.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from srwm_rl.ops.registration import CHUNK, SRWM_INPUTS, new_gradients, new_outputs, register_scan, srwm_widths
from srwm_rl.ops.triton_launch import contiguous_or, device_of, padded
from srwm_rl.ops.triton_step import (
    dot,
    edit_shift,
    lane,
    load_matrix,
    load_record,
    load_row,
    read,
    rows,
    step,
    store_matrix,
)

# mypy: disable-error-code="no-untyped-def, untyped-decorator"


# A batch of 1 is a number like any other. Matrices that are not known to be aligned are loaded number by number, and
# Triton then gives a thread longer parts of columns: at D = 16 a step's reads take 40 shuffles instead of 100.
@triton.jit(
    do_not_specialize=["T", "B", "H"], do_not_specialize_on_alignment=["weight", "shift", "final", "checkpoints"]
)
def _forward_kernel(
    x_ptr, weight, retention, shift, starts, y_ptr, final, checkpoints, T, B, H, bound,
    D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, RETENTION: tl.constexpr,
    BOUND: tl.constexpr, SHIFT: tl.constexpr, STARTS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    pairs = B.to(tl.int64) * H
    matrix = D * (E + 2 * D + 4)
    c = tl.arange(0, M)
    oy, oq, ok, ob = load_matrix(weight + (pair % H) * matrix, D, E, N, M)  # the slow weight
    sy, sq, sk, sb = oy * 0, oq * 0, ok * 0, ob * 0
    if SHIFT:
        sy, sq, sk, sb = load_matrix(shift + pair * matrix, D, E, N, M)
    next_x, next_start, next_kept = load_row(x_ptr, pair, D, N), 0, 1.0
    if STARTS:
        next_start = tl.load(starts + pair // H).to(tl.int32)
    if RETENTION:
        next_kept = tl.load(retention + pair)
    for t in range(0, T):
        x, start, kept = next_x, next_start, next_kept
        following = tl.minimum(t + 1, T - 1)  # the last step loads itself again
        next_x = load_row(x_ptr, following * pairs + pair, D, N)
        if RETENTION:
            next_kept = tl.load(retention + following * pairs + pair)
        if STARTS:
            next_start = tl.load(starts + following * B.to(tl.int64) + pair // H).to(tl.int32)
            keep = tl.where(start != 0, 0.0, 1.0)
            # Selected, not multiplied: the old episode's shift may be infinite.
            sy, sq = tl.where(keep > 0, sy, 0.0), tl.where(keep > 0, sq, 0.0)
            sk, sb = tl.where(keep > 0, sk, 0.0), tl.where(keep > 0, sb, 0.0)
        if KEEP:  # noqa: SIM102 - known when compiled
            if (t > 0) & (t % CHUNK == 0):
                store_matrix(checkpoints + ((t // CHUNK - 1) * pairs + pair) * matrix, sy, sq, sk, sb, D, E, N, M)
        y, _, k, _, ey, eq, ek, eb = step(x, oy + sy, oq + sq, ok + sk, ob + sb, D, N)
        tl.store(y_ptr + (t * pairs + pair) * E + c, y, mask=c < E)
        sy, sq, sk, sb, _ = edit_shift(sy, sq, sk, sb, kept, k, ey, eq, ek, eb, bound, BOUND)
    store_matrix(final + pair * matrix, sy, sq, sk, sb, D, E, N, M)


@triton.jit(do_not_specialize=["T", "B", "H"])  # a batch of 1 is a number like any other
def _backward_kernel(
    x_ptr, weight, retention, shift, starts, checkpoints, grad_y, grad_final, grad_x, grad_weight, grad_retention,
    grad_shift, records, shifts, T, B, H, bound,
    D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, RETENTION: tl.constexpr,
    BOUND: tl.constexpr, SHIFT: tl.constexpr, STARTS: tl.constexpr, GRAD_Y: tl.constexpr, GRAD_FINAL: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    CONSTRAINED: tl.constexpr = (
        RETENTION or BOUND
    )  # then the shifts are stored, and the slow weight's gradient is summed apart
    SIZE: tl.constexpr = 4 * N + M + 12
    pair = tl.program_id(0).to(tl.int64)
    pairs = B.to(tl.int64) * H
    matrix = D * (E + 2 * D + 4)
    j, c, g, steps = tl.arange(0, N), tl.arange(0, M), tl.arange(0, 4), tl.arange(0, CHUNK)
    oy, oq, ok, ob = load_matrix(weight + (pair % H) * matrix, D, E, N, M)
    gy, gq, gk, gb = oy * 0, oq * 0, ok * 0, ob * 0  # the gradient of W, or of the shift
    if CONSTRAINED:
        ay, aq, ak, ab = gy, gq, gk, gb
    if GRAD_FINAL:
        gy, gq, gk, gb = load_matrix(grad_final + pair * matrix, D, E, N, M)
    if not CONSTRAINED:
        store_matrix(grad_weight + pair * matrix, -gy, -gq, -gk, -gb, D, E, N, M)  # final shift = W - slow weight
    end = T
    while end > 0:
        chunk = (end - 1) // CHUNK
        begin = chunk * CHUNK
        reset = begin < 0
        if STARTS:
            at = begin + steps
            flags = tl.load(starts + at * B.to(tl.int64) + pair // H, mask=at < end, other=0)
            begin = tl.max(tl.where(flags != 0, at, begin), 0)
            reset = tl.max(tl.where((flags != 0) & (at == begin), 1, 0), 0) > 0
        wy, wq, wk, wb = load_matrix(weight + (pair % H) * matrix, D, E, N, M)
        if CONSTRAINED:
            sy, sq, sk, sb = wy * 0, wq * 0, wk * 0, wb * 0
        if (begin > 0) & (reset == 0):
            sy, sq, sk, sb = load_matrix(checkpoints + ((chunk - 1) * pairs + pair) * matrix, D, E, N, M)
            wy, wq, wk, wb = wy + sy, wq + sq, wk + sk, wb + sb
        if SHIFT:  # noqa: SIM102
            if (begin == 0) & (reset == 0):
                sy, sq, sk, sb = load_matrix(shift + pair * matrix, D, E, N, M)
                wy, wq, wk, wb = wy + sy, wq + sq, wk + sk, wb + sb
        record, stash = records + pair * (CHUNK * SIZE), shifts + pair * (CHUNK + 1) * matrix
        next_x, next_kept = load_row(x_ptr, begin * pairs + pair, D, N), 1.0
        if RETENTION:
            next_kept = tl.load(retention + begin * pairs + pair)
        for t in range(begin, end):
            x, kept = next_x, next_kept
            following = tl.minimum(t + 1, end - 1) * pairs + pair
            next_x = load_row(x_ptr, following, D, N)
            if RETENTION:
                next_kept = tl.load(retention + following)
            _, q, k, rate, ey, eq, ek, eb = step(x, wy, wq, wk, wb, D, N)
            here = record + (t - begin) * SIZE
            tl.store(here + j, q)
            tl.store(here + N + j, k)
            tl.store(here + 2 * N + j, eq)
            tl.store(here + 3 * N + j, ek)
            tl.store(here + 4 * N + c, ey)
            tl.store(here + 4 * N + M + g, eb)
            tl.store(here + 4 * N + M + 4 + g, rate)
            if CONSTRAINED:
                store_matrix(stash + (t - begin) * matrix, sy, sq, sk, sb, D, E, N, M)
                sy, sq, sk, sb, scale = edit_shift(sy, sq, sk, sb, kept, k, ey, eq, ek, eb, bound, BOUND)
                tl.store(here + 4 * N + M + 8, scale)
                oy, oq, ok, ob = load_matrix(weight + (pair % H) * matrix, D, E, N, M)
                wy, wq, wk, wb = oy + sy, oq + sq, ok + sk, ob + sb
            else:
                k = k[:, None]
                wy, wq, wk, wb = wy + k * ey[None, :], wq + k * eq[None, :], wk + k * ek[None, :], wb + k * eb[None, :]
        if CONSTRAINED:
            store_matrix(stash + (end - begin) * matrix, sy, sq, sk, sb, D, E, N, M)
        tl.debug_barrier()  # other threads read the records
        last = (end - 1) * pairs + pair
        if AHEAD:
            next_q, next_k, next_ey, next_eq, next_ek, next_eb, next_rate = load_record(
                record + (end - 1 - begin) * SIZE, N, M
            )
            next_x, next_y = load_row(x_ptr, last, D, N), next_ey * 0
            if GRAD_Y:
                next_y = load_row(grad_y, last, E, M)
        for n in range(0, end - begin):
            t = end - 1 - n
            here = record + (t - begin) * SIZE
            if AHEAD:
                q, k, ey, eq, ek, eb, rate, x, ry = (
                    next_q, next_k, next_ey, next_eq, next_ek, next_eb, next_rate, next_x, next_y
                )  # fmt: skip
                before = tl.maximum(t - 1, begin)
                next_q, next_k, next_ey, next_eq, next_ek, next_eb, next_rate = load_record(
                    record + (before - begin) * SIZE, N, M
                )
                next_x = load_row(x_ptr, before * pairs + pair, D, N)
                if GRAD_Y:
                    next_y = load_row(grad_y, before * pairs + pair, E, M)
            else:
                q, k, ey, eq, ek, eb, rate = load_record(here, N, M)
                x, ry = load_row(x_ptr, t * pairs + pair, D, N), ey * 0
                if GRAD_Y:
                    ry = load_row(grad_y, t * pairs + pair, E, M)
            if CONSTRAINED:
                kept = 1.0
                if BOUND:
                    scale = tl.load(here + 4 * N + M + 8)
                    if scale > 0:
                        sy, sq, sk, sb = load_matrix(stash + (t + 1 - begin) * matrix, D, E, N, M)
                        along = dot(gy, gq, gk, gb, sy, sq, sk, sb) / bound / bound
                        gy, gq = (gy - sy * along) * scale, (gq - sq * along) * scale
                        gk, gb = (gk - sk * along) * scale, (gb - sb * along) * scale
                sy, sq, sk, sb = load_matrix(stash + (t - begin) * matrix, D, E, N, M)
                oy, oq, ok, ob = load_matrix(weight + (pair % H) * matrix, D, E, N, M)
                wy, wq, wk, wb = oy + sy, oq + sq, ok + sk, ob + sb
                if RETENTION:
                    kept = tl.load(retention + t * pairs + pair)
                    along = dot(gy, gq, gk, gb, sy, sq, sk, sb)  # the gradient of the retention
            else:
                wy, wq = wy - k[:, None] * ey[None, :], wq - k[:, None] * eq[None, :]
                wk, wb = wk - k[:, None] * ek[None, :], wb - k[:, None] * eb[None, :]
            grad_k = rows(gy, gq, gk, gb, ey, eq, ek, eb, M == N)
            hy, hq, hk, hb = read(k, gy, gq, gk, gb)  # the gradient of e, then of d
            sums = tl.where(g == 0, tl.sum(hy * ey, 0), tl.where(g == 1, tl.sum(hq * eq, 0), tl.sum(hk * ek, 0)))
            sums = tl.where(g == 3, tl.sum(hb * eb, 0), sums)
            if RETENTION:
                if BOUND:  # the more precise of two equal numbers: see csrc/constrained_kernel.h
                    edit = tl.sum(ey * ey, 0) + tl.sum(eq * eq + ek * ek, 0) + tl.sum(eb * eb, 0)
                    small = 4 * tl.sum(k * k, 0) * edit * scale * scale < bound * bound
                    along = tl.where((scale > 0) & small, -tl.sum(sums, 0) / kept, along)
                tl.store(grad_retention + t * pairs + pair, along)
            hy, hq, hk, hb = hy * lane(rate, 0), hq * lane(rate, 1), hk * lane(rate, 2), hb * lane(rate, 3)
            grad_u = rows(wy, wq, wk, wb, hy, hq, hk, hb, M == N)
            grad_k -= grad_u
            rq = q * (grad_u - tl.sum(q * grad_u, 0))
            rk = k * (grad_k - tl.sum(k * grad_k, 0))
            rb = sums * (1 - rate)
            out = rows(wy, wq, wk, wb, ry, rq, rk, rb, M == N)
            tl.store(grad_x + (t * pairs + pair) * D + j, out, mask=j < D)
            x, u = x[:, None], (q - k)[:, None]
            if CONSTRAINED:
                fy, fq = u * hy[None, :] + x * ry[None, :], u * hq[None, :] + x * rq[None, :]
                fk, fb = u * hk[None, :] + x * rk[None, :], u * hb[None, :] + x * rb[None, :]
                ay, aq, ak, ab = ay + fy, aq + fq, ak + fk, ab + fb
                gy, gq, gk, gb = gy * kept + fy, gq * kept + fq, gk * kept + fk, gb * kept + fb
            else:
                gy, gq = gy + u * hy[None, :] + x * ry[None, :], gq + u * hq[None, :] + x * rq[None, :]
                gk, gb = gk + u * hk[None, :] + x * rk[None, :], gb + u * hb[None, :] + x * rb[None, :]
        tl.debug_barrier()
        if not CONSTRAINED:  # noqa: SIM102
            if (begin == 0) | (reset != 0):
                sy, sq, sk, sb = load_matrix(grad_weight + pair * matrix, D, E, N, M)
                store_matrix(grad_weight + pair * matrix, sy + gy, sq + gq, sk + gk, sb + gb, D, E, N, M)
        if reset:
            gy, gq, gk, gb = gy * 0, gq * 0, gk * 0, gb * 0
        end = begin
    if CONSTRAINED:
        store_matrix(grad_weight + pair * matrix, ay, aq, ak, ab, D, E, N, M)
    if SHIFT:
        store_matrix(grad_shift + pair * matrix, gy, gq, gk, gb, D, E, N, M)


def forward(
    x: Tensor,
    weight: Tensor,
    retention: Tensor | None,
    shift: Tensor | None,
    starts: Tensor | None,
    bound: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `y`, the final shift and, with `keep`, the shift at every `CHUNK`-th step for `backward`."""
    x, weight = x.contiguous(), weight.contiguous()
    n_steps, batch, heads, size = x.shape
    width, columns = srwm_widths(x, weight)
    y, final, checkpoints = new_outputs(x, width, columns, keep)
    optional = [contiguous_or(tensor, x) for tensor in (retention, shift, starts)]
    with device_of(x):
        _forward_kernel[(batch * heads,)](
            x, weight, *optional, y, final, checkpoints, n_steps, batch, heads, bound or 0.0,
            RETENTION=retention is not None, BOUND=bound is not None, SHIFT=shift is not None,
            STARTS=starts is not None, KEEP=keep, **launch_sizes(size, width),
        )  # fmt: skip
    return y, final, checkpoints


def backward(
    x: Tensor,
    weight: Tensor,
    retention: Tensor | None,
    shift: Tensor | None,
    starts: Tensor | None,
    bound: float | None,
    checkpoints: Tensor,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `x`, `weight`, `retention` and `shift` (empty where there was none)."""
    x, weight = x.contiguous(), weight.contiguous()
    n_steps, batch, heads, size = x.shape
    width, columns = srwm_widths(x, weight)
    sizes = launch_sizes(size, width)
    grad_x, _, grad_retention, grad_shift = new_gradients((x, weight, retention, shift))
    grad_weight = x.new_empty(batch, *weight.shape)  # one for each batch entry: the sum's order is then fixed
    records = x.new_empty(batch * heads, CHUNK * (4 * sizes["N"] + sizes["M"] + 12))
    constrained = retention is not None or bound is not None
    shifts = x.new_empty(batch * heads * (CHUNK + 1) if constrained else 0, size, columns)
    optional = [contiguous_or(tensor, x) for tensor in (retention, shift, starts)]
    upstream = [contiguous_or(tensor, x) for tensor in (grad_y, grad_final)]
    with device_of(x):
        _backward_kernel[(batch * heads,)](
            x, weight, *optional, checkpoints, *upstream, grad_x, grad_weight, grad_retention, grad_shift, records,
            shifts, n_steps, batch, heads, bound or 0.0, RETENTION=retention is not None, BOUND=bound is not None,
            SHIFT=shift is not None, STARTS=starts is not None, GRAD_Y=grad_y is not None,
            GRAD_FINAL=grad_final is not None, AHEAD=loads_ahead(sizes, constrained), **sizes,
        )  # fmt: skip
    return grad_x, grad_weight.sum(0), grad_retention, grad_shift


def launch_sizes(size: int, width: int) -> dict[str, int]:
    """Return the kernels' compile-time sizes and warps for heads of `size` and an output of `width`."""
    tile = padded(size)
    warps = {4: 1, 8: 1, 16: 1, 32: 4, 64: 8}[tile]
    return {"D": size, "E": width, "N": tile, "M": padded(width), "CHUNK": CHUNK, "num_warps": warps}


def loads_ahead(sizes: dict[str, int], constrained: bool) -> bool:
    """Return whether backward's registers hold what the next step reads, too; beyond, they would be spilled."""
    per_thread = (sizes["M"] + 2 * sizes["N"] + 4) * sizes["N"] / (32 * sizes["num_warps"])  # numbers of a matrix
    return per_thread <= (26 if constrained else 49)


scan = register_scan("scan_triton", SRWM_INPUTS, srwm_widths, forward, backward)
