"""The GPU backend: one Triton launch forward and one backward, a program for each (batch, head) pair.

W stays in registers for the whole unroll, as four tiles y, q, k `[D, D]` and beta `[D, 4]`. Backward goes chunk by
chunk from the checkpoints, recomputes a chunk's steps and undoes their edits on the way back; see README.md. With
TRITON_INTERPRET=1 set before this is imported it runs on the CPU, for the tests.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from srwm_rl.ops.registration import CHUNK, SRWM_INPUTS, register_scan

MAX_HEAD_SIZE = 64  # beyond, the registers do not hold a head's weight and its gradient
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Say why this backend cannot take such tensors, or return None."""
    if device_type != ("cpu" if INTERPRETED else "cuda"):
        return f"x is on {device_type}, not on a CUDA device"
    if dtype != torch.float32:
        return f"x is {dtype}; the Triton kernel takes float32"
    if head_size > MAX_HEAD_SIZE:
        return f"x has head size {head_size}; the Triton kernel takes up to {MAX_HEAD_SIZE}"
    return None


# mypy: disable-error-code="no-untyped-def, untyped-decorator"


@triton.jit
def _load(base, D: tl.constexpr, N: tl.constexpr):
    """Load the four tiles of a `[D, 3D+4]` matrix, zero beyond D."""
    i, j, g = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, 4)[None, :]
    at = base + i * (3 * D + 4)
    inside, inside_b = (i < D) & (j < D), (i < D) & (g < 4)
    y = tl.load(at + j, mask=inside, other=0.0)
    q = tl.load(at + D + j, mask=inside, other=0.0)
    k = tl.load(at + 2 * D + j, mask=inside, other=0.0)
    b = tl.load(at + 3 * D + g, mask=inside_b, other=0.0)
    return y, q, k, b


@triton.jit
def _store(base, y, q, k, b, D: tl.constexpr, N: tl.constexpr):
    i, j, g = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, 4)[None, :]
    at = base + i * (3 * D + 4)
    inside, inside_b = (i < D) & (j < D), (i < D) & (g < 4)
    tl.store(at + j, y, mask=inside)
    tl.store(at + D + j, q, mask=inside)
    tl.store(at + 2 * D + j, k, mask=inside)
    tl.store(at + 3 * D + g, b, mask=inside_b)


@triton.jit
def _read(a, y, q, k, b):
    """Return `a W` by column group."""
    a = a[:, None]
    return tl.sum(a * y, 0), tl.sum(a * q, 0), tl.sum(a * k, 0), tl.sum(a * b, 0)


@triton.jit
def _softmax(logits, D: tl.constexpr, N: tl.constexpr):
    logits = tl.where(tl.arange(0, N) < D, logits, float("-inf"))
    e = tl.exp(logits - tl.max(logits, 0))
    return e / tl.sum(e, 0)


@triton.jit
def _lane(v, n: tl.constexpr):
    """Return number `n` of a vector of four."""
    return tl.sum(tl.where(tl.arange(0, 4) == n, v, 0.0), 0)


@triton.jit
def _step(x, wy, wq, wk, wb, D: tl.constexpr, N: tl.constexpr):
    """Return what a step reads and how it edits W: y, q, k, the rates, and the edit e by column group."""
    y, q, k, b = _read(x, wy, wq, wk, wb)
    q, k, rate = _softmax(q, D, N), _softmax(k, D, N), 1 / (1 + tl.exp(-b))
    dy, dq, dk, db = _read(q - k, wy, wq, wk, wb)
    return y, q, k, rate, dy * _lane(rate, 0), dq * _lane(rate, 1), dk * _lane(rate, 2), db * _lane(rate, 3)


@triton.jit(do_not_specialize=["T", "B", "H"])  # a batch of 1 is a number like any other
def _forward_kernel(
    x_ptr, weight, shift, starts, y_ptr, final, checkpoints, T, B, H,
    D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr, STARTS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    pairs = B.to(tl.int64) * H
    matrix = D * (3 * D + 4)
    j = tl.arange(0, N)
    oy, oq, ok, ob = _load(weight + (pair % H) * matrix, D, N)  # the slow weight
    sy, sq, sk, sb = oy * 0, oq * 0, ok * 0, ob * 0
    if SHIFT:
        sy, sq, sk, sb = _load(shift + pair * matrix, D, N)
    for t in range(0, T):
        if STARTS:
            keep = tl.where(tl.load(starts + t * B.to(tl.int64) + pair // H) != 0, 0.0, 1.0)
            # Chosen, not multiplied: the old episode may have blown up.
            sy, sq = tl.where(keep > 0, sy, 0.0), tl.where(keep > 0, sq, 0.0)
            sk, sb = tl.where(keep > 0, sk, 0.0), tl.where(keep > 0, sb, 0.0)
        if KEEP:  # noqa: SIM102 - known when compiled
            if (t > 0) & (t % CHUNK == 0):
                _store(checkpoints + ((t // CHUNK - 1) * pairs + pair) * matrix, sy, sq, sk, sb, D, N)
        x = tl.load(x_ptr + (t * pairs + pair) * D + j, mask=j < D, other=0.0)
        y, _, k, _, ey, eq, ek, eb = _step(x, oy + sy, oq + sq, ok + sk, ob + sb, D, N)
        tl.store(y_ptr + (t * pairs + pair) * D + j, y, mask=j < D)
        k = k[:, None]
        sy, sq, sk, sb = sy + k * ey[None, :], sq + k * eq[None, :], sk + k * ek[None, :], sb + k * eb[None, :]
    _store(final + pair * matrix, sy, sq, sk, sb, D, N)


@triton.jit(do_not_specialize=["T", "B", "H"])  # a batch of 1 is a number like any other
def _backward_kernel(
    x_ptr, weight, shift, starts, checkpoints, grad_y, grad_final, grad_x, grad_weight, grad_shift, records, T, B, H,
    D: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr, STARTS: tl.constexpr,
    GRAD_Y: tl.constexpr, GRAD_FINAL: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    pairs = B.to(tl.int64) * H
    matrix = D * (3 * D + 4)
    j, g, steps = tl.arange(0, N), tl.arange(0, 4), tl.arange(0, CHUNK)
    oy, oq, ok, ob = _load(weight + (pair % H) * matrix, D, N)
    gy, gq, gk, gb = oy * 0, oq * 0, ok * 0, ob * 0  # the gradient of W
    if GRAD_FINAL:
        gy, gq, gk, gb = _load(grad_final + pair * matrix, D, N)
    _store(grad_weight + pair * matrix, -gy, -gq, -gk, -gb, D, N)  # final shift = W - slow weight
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
        wy, wq, wk, wb = _load(weight + (pair % H) * matrix, D, N)
        if (begin > 0) & (reset == 0):
            sy, sq, sk, sb = _load(checkpoints + ((chunk - 1) * pairs + pair) * matrix, D, N)
            wy, wq, wk, wb = wy + sy, wq + sq, wk + sk, wb + sb
        if SHIFT:  # noqa: SIM102
            if (begin == 0) & (reset == 0):
                sy, sq, sk, sb = _load(shift + pair * matrix, D, N)
                wy, wq, wk, wb = wy + sy, wq + sq, wk + sk, wb + sb
        record = records + pair * (CHUNK * (5 * N + 8))
        for t in range(begin, end):
            x = tl.load(x_ptr + (t * pairs + pair) * D + j, mask=j < D, other=0.0)
            _, q, k, rate, ey, eq, ek, eb = _step(x, wy, wq, wk, wb, D, N)
            here = record + (t - begin) * (5 * N + 8)
            tl.store(here + j, q)
            tl.store(here + N + j, k)
            tl.store(here + 2 * N + j, ey)
            tl.store(here + 3 * N + j, eq)
            tl.store(here + 4 * N + j, ek)
            tl.store(here + 5 * N + g, eb)
            tl.store(here + 5 * N + 4 + g, rate)
            k = k[:, None]
            wy, wq, wk, wb = wy + k * ey[None, :], wq + k * eq[None, :], wk + k * ek[None, :], wb + k * eb[None, :]
        tl.debug_barrier()  # what one thread has recorded another may read
        for n in range(0, end - begin):
            t = end - 1 - n
            here = record + (t - begin) * (5 * N + 8)
            q, k = tl.load(here + j), tl.load(here + N + j)
            ey, eq, ek = tl.load(here + 2 * N + j), tl.load(here + 3 * N + j), tl.load(here + 4 * N + j)
            eb, rate = tl.load(here + 5 * N + g), tl.load(here + 5 * N + 4 + g)
            wy, wq = wy - k[:, None] * ey[None, :], wq - k[:, None] * eq[None, :]
            wk, wb = wk - k[:, None] * ek[None, :], wb - k[:, None] * eb[None, :]
            grad_k = tl.sum(gy * ey[None, :] + gq * eq[None, :] + gk * ek[None, :], 1) + tl.sum(gb * eb[None, :], 1)
            hy, hq, hk, hb = _read(k, gy, gq, gk, gb)  # the gradient of e, then of d
            sums = tl.where(g == 0, tl.sum(hy * ey, 0), tl.where(g == 1, tl.sum(hq * eq, 0), tl.sum(hk * ek, 0)))
            sums = tl.where(g == 3, tl.sum(hb * eb, 0), sums)
            hy, hq, hk, hb = hy * _lane(rate, 0), hq * _lane(rate, 1), hk * _lane(rate, 2), hb * _lane(rate, 3)
            grad_u = tl.sum(wy * hy[None, :] + wq * hq[None, :] + wk * hk[None, :], 1) + tl.sum(wb * hb[None, :], 1)
            grad_k -= grad_u
            ry = q * 0
            if GRAD_Y:
                ry = tl.load(grad_y + (t * pairs + pair) * D + j, mask=j < D, other=0.0)
            rq = q * (grad_u - tl.sum(q * grad_u, 0))
            rk = k * (grad_k - tl.sum(k * grad_k, 0))
            rb = sums * (1 - rate)
            out = tl.sum(wy * ry[None, :] + wq * rq[None, :] + wk * rk[None, :], 1) + tl.sum(wb * rb[None, :], 1)
            tl.store(grad_x + (t * pairs + pair) * D + j, out, mask=j < D)
            x = tl.load(x_ptr + (t * pairs + pair) * D + j, mask=j < D, other=0.0)[:, None]
            u = (q - k)[:, None]
            gy, gq = gy + u * hy[None, :] + x * ry[None, :], gq + u * hq[None, :] + x * rq[None, :]
            gk, gb = gk + u * hk[None, :] + x * rk[None, :], gb + u * hb[None, :] + x * rb[None, :]
        tl.debug_barrier()
        if (begin == 0) | (reset != 0):
            sy, sq, sk, sb = _load(grad_weight + pair * matrix, D, N)
            _store(grad_weight + pair * matrix, sy + gy, sq + gq, sk + gk, sb + gb, D, N)
        if reset:
            gy, gq, gk, gb = gy * 0, gq * 0, gk * 0, gb * 0
        end = begin
    if SHIFT:
        _store(grad_shift + pair * matrix, gy, gq, gk, gb, D, N)


def forward(
    x: Tensor, weight: Tensor, shift: Tensor | None, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `y`, the final shift and, with `keep`, the shift at every `CHUNK`-th step for `backward`."""
    x, weight = x.contiguous(), weight.contiguous()
    n_steps, batch, heads, size = x.shape
    y = torch.empty_like(x)
    final = x.new_empty(batch, *weight.shape)
    checkpoints = x.new_empty((n_steps - 1) // CHUNK if keep else 0, *final.shape)
    with _on(x):
        _forward_kernel[(batch * heads,)](
            x, weight, _or(shift, x), _or(starts, x), y, final, checkpoints, n_steps, batch, heads,
            SHIFT=shift is not None, STARTS=starts is not None, KEEP=keep, **_sizes(size),
        )  # fmt: skip
    return y, final, checkpoints


def backward(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    starts: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `x`, of `weight`, and of `shift` (empty where there was none)."""
    x, weight = x.contiguous(), weight.contiguous()
    n_steps, batch, heads, size = x.shape
    sizes = _sizes(size)
    grad_x = torch.empty_like(x)
    grad_weight = x.new_empty(batch, *weight.shape)  # one for each batch entry: the sum's order is then fixed
    grad_shift = x.new_empty(0) if shift is None else torch.empty_like(grad_weight)
    records = x.new_empty(batch * heads, CHUNK * (5 * sizes["N"] + 8))
    with _on(x):
        _backward_kernel[(batch * heads,)](
            x, weight, _or(shift, x), _or(starts, x), checkpoints, _or(grad_y, x), _or(grad_final, x),
            grad_x, grad_weight, grad_shift, records, n_steps, batch, heads,
            SHIFT=shift is not None, STARTS=starts is not None,
            GRAD_Y=grad_y is not None, GRAD_FINAL=grad_final is not None, **sizes,
        )  # fmt: skip
    return grad_x, grad_weight.sum(0), grad_shift


def _on(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    return unused if tensor is None else tensor.contiguous()


def _sizes(size: int) -> dict[str, int]:
    padded = max(4, triton.next_power_of_2(size))
    return {"D": size, "N": padded, "CHUNK": CHUNK, "num_warps": {4: 1, 8: 1, 16: 1, 32: 4, 64: 8}[padded]}


_operator = register_scan("scan_triton", SRWM_INPUTS, lambda size: 3 * size + 4, forward, backward)


def scan(x: Tensor, weight: Tensor, shift: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the checked arguments of `srwm_scan`; `starts` is uint8."""
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, shift))
    y, final, _ = _operator(x, weight, shift, starts, grad)
    return y, final
