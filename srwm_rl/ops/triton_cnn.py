"""Triton kernels of a CNN on channels-last images: what follows a convolution in one pass, and max pooling.

They read and write memory once; a program has some rows, a row being the channels of a pixel. Sums are in float32 and
in a fixed order. If TRITON_INTERPRET=1 is set before the import, they run on the CPU, for the tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from srwm_rl.ops.triton_launch import device_of, padded

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
_LAST = torch.channels_last
NUMBERS = 1024  # of a program's tile: 8 for each of its threads, which bfloat16 loads at once
MAX_PROGRAMS = 1024  # that add a bias's gradient, each into a row of its own


@triton.jit
def _tile(first, n_rows, C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):
    """Return the rows of a tile, the places of its numbers, and which of them exist."""
    rows, j = first + tl.arange(0, ROWS)[:, None], tl.arange(0, N)[None, :]
    return rows, rows.to(tl.int64) * C + j, (rows < n_rows) & (j < C)


@triton.jit(do_not_specialize=["n_rows"])
def _epilogue_kernel(
    x, bias, skip, total, rectified, n_rows,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr, TOTAL: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    _, at, inside = _tile(tl.program_id(0) * ROWS, n_rows, C, N, ROWS)
    j = tl.arange(0, N)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(bias + j, mask=j < C, other=0.0)[None, :]
    if SKIP:
        y += tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
    if TOTAL:
        tl.store(total + at, y, mask=inside)
    if RELU:
        tl.store(rectified + at, tl.where(y < 0, 0.0, y), mask=inside)  # NaN stays


@triton.jit(do_not_specialize=["n_rows", "stride"])
def _epilogue_backward_kernel(
    rectified, grad_total, grad_rectified, grad, grad_bias, n_rows, stride,
    C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros((ROWS, N), tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_rows, stride):
        _, at, inside = _tile(first, n_rows, C, N, ROWS)
        g = tl.load(grad_rectified + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(tl.load(rectified + at, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, g)
        if TOTAL:
            g += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad + at, g, mask=inside)
        sums += g
    j = tl.arange(0, N)
    tl.store(grad_bias + tl.program_id(0) * C + j, tl.sum(sums, 0), mask=j < C)


@triton.jit(do_not_specialize=["n_rows", "h", "w"])
def _pool_kernel(
    x, y, which, n_rows, h, w, C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    rows, at, inside = _tile(tl.program_id(0) * ROWS, n_rows, C, N, ROWS)
    j, out_h, out_w = tl.arange(0, N)[None, :], (h + 1) // 2, (w + 1) // 2
    image, row, column = rows // (out_h * out_w), rows // out_w % out_h, rows % out_w
    best = tl.full((ROWS, N), float("-inf"), tl.float32)
    place = tl.full((ROWS, N), 0, tl.int32)
    for n in tl.static_range(9):
        i, k = 2 * row + n // 3 - 1, 2 * column + n % 3 - 1
        valid = inside & (i >= 0) & (i < h) & (k >= 0) & (k < w)
        from_x = ((image.to(tl.int64) * h + i) * w + k) * C + j
        value = tl.load(x + from_x, mask=valid, other=float("-inf")).to(tl.float32)
        larger = (value > best) | (value != value)  # the first of equal ones, and NaN, as torch does
        best, place = tl.where(larger, value, best), tl.where(larger, n, place)
    tl.store(y + at, best, mask=inside)
    if KEEP:
        tl.store(which + at, place.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "h", "w"])
def _pool_backward_kernel(
    which, grad, grad_x, n_rows, h, w, C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    rows, at, inside = _tile(tl.program_id(0) * ROWS, n_rows, C, N, ROWS)
    j, out_h, out_w = tl.arange(0, N)[None, :], (h + 1) // 2, (w + 1) // 2
    image, i, k = rows // (h * w), rows // w % h, rows % w
    total = tl.zeros((ROWS, N), tl.float32)
    for n in tl.static_range(4):  # an odd row lies in two windows, an even one in one; columns likewise
        row, column = (i + n // 2) // 2, (k + n % 2) // 2
        in_row, in_column = (i % 2 == 1) | (n // 2 == 0), (k % 2 == 1) | (n % 2 == 0)
        valid = inside & in_row & in_column & (row < out_h) & (column < out_w)
        from_y = ((image.to(tl.int64) * out_h + row) * out_w + column) * C + j
        place = (i + 1 - 2 * row) * 3 + k + 1 - 2 * column
        chosen = tl.load(which + from_y, mask=valid, other=255).to(tl.int32) == place
        total += tl.where(chosen, tl.load(grad + from_y, mask=valid, other=0.0).to(tl.float32), 0.0)
    tl.store(grad_x + at, total, mask=inside)


def launch_sizes(channels: int) -> dict[str, int]:
    """Return the kernels' compile-time sizes for images of so many channels."""
    width = padded(channels)
    return {"C": channels, "N": width, "ROWS": max(1, NUMBERS // width)}


def epilogue(
    x: Tensor, bias: Tensor, skip: Tensor | None = None, total: bool = False, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """Return `x + bias + skip` and its ReLU, each empty unless asked for; see `srwm_rl.ops.cnn.epilogue`."""
    skip = None if skip is None else _channels_last(skip)
    return _Epilogue.apply(_channels_last(x), bias, skip, total, relu)  # type: ignore[no-any-return]


def max_pool(x: Tensor) -> Tensor:
    """Return `F.max_pool2d(x, 3, stride=2, padding=1)`; for the backward pass it stores one byte per number."""
    return _MaxPool.apply(_channels_last(x))  # type: ignore[no-any-return]


class _Epilogue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, skip: Tensor | None, total: bool, relu: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        sums, rectified = (torch.empty_like(x) if wanted else x.new_empty(0) for wanted in (total, relu))
        n_rows, sizes = _rows(x), launch_sizes(x.shape[1])
        with device_of(x):
            _epilogue_kernel[(triton.cdiv(n_rows, sizes["ROWS"]),)](
                x, bias, x if skip is None else skip, sums, rectified, n_rows, SKIP=skip is not None, TOTAL=total,
                RELU=relu, **sizes,
            )  # fmt: skip
        ctx.save_for_backward(rectified)
        return sums, rectified

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_rectified: Tensor | None) -> tuple[Tensor | None, ...]:
        (rectified,) = ctx.saved_tensors
        if grad_rectified is None or rectified.numel() == 0:
            assert grad_total is not None
            grad, grad_bias = grad_total, grad_total.sum((0, 2, 3), dtype=torch.float32)
        else:
            grad, grad_bias = _epilogue_backward(rectified, grad_total, _channels_last(grad_rectified))
        return grad, grad_bias, grad if ctx.needs_input_grad[2] else None, None, None


def _epilogue_backward(rectified: Tensor, grad_total: Tensor | None, grad_rectified: Tensor) -> tuple[Tensor, Tensor]:
    n_rows, sizes = _rows(rectified), launch_sizes(rectified.shape[1])
    programs = min(MAX_PROGRAMS, triton.cdiv(n_rows, sizes["ROWS"]))
    grad = torch.empty_like(rectified)
    sums = rectified.new_empty(programs, rectified.shape[1], dtype=torch.float32)
    with device_of(rectified):
        _epilogue_backward_kernel[(programs,)](
            rectified, grad_rectified if grad_total is None else _channels_last(grad_total), grad_rectified, grad, sums,
            n_rows, programs * sizes["ROWS"], TOTAL=grad_total is not None, **sizes,
        )  # fmt: skip
    return grad, sums.sum(0)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = torch.empty(n, c, (h + 1) // 2, (w + 1) // 2, dtype=x.dtype, device=x.device, memory_format=_LAST)
        keep, sizes = ctx.needs_input_grad[0], launch_sizes(c)
        which = torch.empty_like(y, dtype=torch.uint8) if keep else y
        with device_of(x):
            _pool_kernel[(triton.cdiv(_rows(y), sizes["ROWS"]),)](x, y, which, _rows(y), h, w, KEEP=keep, **sizes)
        ctx.save_for_backward(which)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (which,) = ctx.saved_tensors
        _, c, h, w = ctx.shape
        grad, sizes = _channels_last(grad), launch_sizes(c)
        grad_x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=_LAST)
        with device_of(grad):
            _pool_backward_kernel[(triton.cdiv(_rows(grad_x), sizes["ROWS"]),)](
                which, grad, grad_x, _rows(grad_x), h, w, **sizes
            )
        return grad_x


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_LAST)


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]
