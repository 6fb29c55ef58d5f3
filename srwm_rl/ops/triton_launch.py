"""What the Triton kernels' launches share: which tensors they can run, padding, and absent arguments."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

MAX_HEAD_SIZE, MAX_TILE = 64, 8192  # registers hold a head's weight and its gradient up to here
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device_type: str, dtype: torch.dtype, head_size: int, width: int = 1) -> str | None:
    """Return why the Triton kernels cannot run such tensors, `width` being that of an SRWM's output, or None."""
    if device_type != ("cpu" if INTERPRETED else "cuda"):
        return f"x is on {device_type}, not on a CUDA device"
    if dtype != torch.float32:
        return f"x is {dtype}; the Triton kernel takes float32"
    if head_size > MAX_HEAD_SIZE:
        return f"x has head size {head_size}; the Triton kernel takes up to {MAX_HEAD_SIZE}"
    if padded(head_size) * padded(width) > MAX_TILE:
        return f"x has head size {head_size} and y is {width} wide, too much for the Triton kernel"
    return None


def padded(size: int) -> int:
    """Return the width of a tile that holds `size` numbers: a power of two, at least 4."""
    return max(4, int(triton.next_power_of_2(size)))


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return the context in which kernels are launched on a tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def contiguous_or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Return a tensor in contiguous memory; for None `unused`, of which a kernel reads nothing."""
    return unused if tensor is None else tensor.contiguous()
