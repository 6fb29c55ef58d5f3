"""Max pooling of channels-last images, in C on the CPU: torch's own takes a quarter of a training CNN's time."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from srwm_rl.ops.backends import is_forward_mode
from srwm_rl.ops.checks import has_memory
from srwm_rl.ops.cpu import load_kernel

DTYPES = (torch.float32, torch.bfloat16)
_COUNTS = ("n", "h", "w", "c", "grain", "next")
_PIXELS_WORTH_THREADS = 2**19  # some 50 us


class _Pool(ctypes.Structure):
    """`Pool` of csrc/srwm_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_void_p) for name in ("x", "y", "which")),
        *((name, ctypes.c_int) for name in ("is_half", "back")),
        *((name, ctypes.c_int64) for name in ("x_row", "y_row")),
    )


def max_pool(x: Tensor) -> Tensor:
    """Return `F.max_pool2d(x, 3, stride=2, padding=1)`.

    The bits are the same; gradients in bfloat16 are summed in float32 and rounded once.

    Args:
        x: `[N, C, h, w]`. Pooled in C if on the CPU, channels-last, float32 or bfloat16 and C is a multiple of the
            vector width; else by torch.

    Returns:
        `[N, C, ceil(h / 2), ceil(w / 2)]`.
    """
    if _in_c(x):
        return _MaxPool.apply(x) if torch.is_grad_enabled() and x.requires_grad else _forward(x, None)
    return F.max_pool2d(x, 3, stride=2, padding=1)


def _in_c(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype not in DTYPES or not has_memory(x) or x.numel() == 0 or is_forward_mode():
        return False
    kernel = load_kernel()
    return (
        not isinstance(kernel, str)
        and x.is_contiguous(memory_format=torch.channels_last)
        and bool(kernel.library.srwm_cpu_can_max_pool(x.shape[1], kernel.level))
    )


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        which = x.new_empty(n, (h + 1) // 2, (w + 1) // 2, c, dtype=torch.uint8)
        ctx.save_for_backward(which)
        ctx.shape = x.shape
        return _forward(x, which)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (which,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty(ctx.shape, dtype=grad.dtype, device="cpu", memory_format=torch.channels_last)
        _run(grad_x, grad, which, back=True)
        return grad_x


def _forward(x: Tensor, which: Tensor | None) -> Tensor:
    n, c, h, w = x.shape
    size = (n, c, (h + 1) // 2, (w + 1) // 2)
    y = torch.empty(size, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    _run(x, y, which)
    return y


def _run(x: Tensor, y: Tensor, which: Tensor | None, back: bool = False) -> None:
    kernel = load_kernel()
    assert not isinstance(kernel, str)
    n, c, h, w = x.shape
    pool = _Pool(n, h, w, c, x=x.data_ptr(), y=y.data_ptr(), is_half=x.dtype == torch.bfloat16, back=back)
    if which is not None:
        pool.which = which.data_ptr()
    threads = torch.get_num_threads() if x.numel() > _PIXELS_WORTH_THREADS else 1
    kernel.library.srwm_cpu_max_pool(ctypes.byref(pool), kernel.level, threads, kernel.parallel)
