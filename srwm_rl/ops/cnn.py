"""What follows a convolution on a GPU in few passes over memory: bias, skip connection and ReLU, or max pooling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from srwm_rl.ops.backends import triton_module


def epilogue(
    x: Tensor, bias: Tensor, skip: Tensor | None = None, total: bool = False, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the sum `x + bias + skip` and its ReLU, added in float32 and rounded once.

    Args:
        x: a convolution's output without bias, `[N, C, h, w]`, float32 or bfloat16.
        bias: `[C]`, float32.
        skip: as `x`; None: nothing.
        total: whether the sum is wanted.
        relu: whether its ReLU is wanted.

    Returns:
        Both as `x`; what is not wanted is empty.
    """
    kernels = triton_module("triton_cnn", x.device.type)
    return (kernels.epilogue if kernels else reference)(x, bias, skip, total, relu)


def max_pool(x: Tensor) -> Tensor:
    """Return `F.max_pool2d(x, 3, stride=2, padding=1)`: `[N, C, h, w]` to `[N, C, ceil(h / 2), ceil(w / 2)]`."""
    kernels = triton_module("triton_cnn", x.device.type)
    return kernels.max_pool(x) if kernels else F.max_pool2d(x, 3, stride=2, padding=1)


def reference(
    x: Tensor, bias: Tensor, skip: Tensor | None = None, total: bool = False, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """Return what `epilogue` does, in plain PyTorch."""
    y = x.float() + bias[:, None, None]
    y = y if skip is None else y + skip.float()
    empty = x.new_empty(0)
    return y.to(x.dtype) if total else empty, torch.relu(y).to(x.dtype) if relu else empty
