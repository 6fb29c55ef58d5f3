"""`short_conv`: a causal depthwise convolution over the last few steps, with episode resets inside."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srwm_rl.ops.backends import is_forward_mode, preferred
from srwm_rl.ops.checks import as_uint8, check_starts, check_tensor, has_memory
from srwm_rl.ops.cpu import load_kernel

_POINTERS = ("x", "weight", "state", "starts", "y", "final", "grad_y", "grad_final")
_GRADS = ("grad_x", "grad_weight", "grad_state")


class _Conv(ctypes.Structure):
    """`Conv` of csrc/srwm_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("T", "B", "C", "W")),
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_GRADS)),
    )


def short_conv(x: Tensor, weight: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return `y[t] = sum_j weight[j] * x[t - j]`, where inputs from before the episode's start count as 0.

    In C on the CPU in float32, elsewhere in PyTorch.

    Args:
        x: `[T, B, C]`.
        weight: `[W, C]`, a factor per channel for the present input, the one before, and so on; W >= 2.
        state: `[B, W - 1, C]`, the last inputs before the unroll, the newest first; zeros: a new episode.
        episode_starts: `[T, B]`; where non-zero, earlier inputs of that environment count as 0 from that step on.

    Returns:
        `y` `[T, B, C]` and the new state.

    Raises:
        ValueError: in C, a shape, dtype or device that does not fit `x`; the message names the argument.
    """
    if not _in_c(x):
        return short_conv_reference(x, weight, state, episode_starts)
    (_, batch, channels), width = x.shape, len(weight)
    check_tensor("weight", weight, (width, channels), "x", x)
    check_tensor("state", state, (batch, width - 1, channels), "x", x)
    check_starts(episode_starts, "x", x)
    starts = as_uint8(episode_starts)
    assert starts is not None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, state)):
        y, final = _ShortConv.apply(x, weight, state, starts)
        return y, final
    return _forward(x, weight, state, starts)


def short_conv_reference(x: Tensor, weight: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `short_conv` in PyTorch, all steps at once."""
    width, n_steps = len(weight), len(x)
    inputs = torch.cat((state.transpose(0, 1).flip(0), x))  # [W - 1 + T, B, C]
    starts = episode_starts != 0
    reset = torch.zeros_like(starts)  # [T, B], whether an episode starts after step t - tap, up to t
    taps = [x]
    for tap in range(1, width):
        reset = reset | torch.cat((torch.zeros_like(starts[: tap - 1]), starts))[:n_steps]
        taps.append(inputs[width - 1 - tap : width - 1 - tap + n_steps].masked_fill(reset[..., None], 0))
    windows = torch.stack(taps, dim=2)  # [T, B, W, C]
    return (windows * weight).sum(2), windows[-1, :, :-1]


def _in_c(x: Tensor) -> bool:
    return (
        (x.device.type, x.dtype) == ("cpu", torch.float32)
        and preferred() in ("auto", "cpu")
        and has_memory(x)
        and x.numel() > 0
        and not is_forward_mode()
        and not isinstance(load_kernel(), str)
    )


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, state, starts)
        ctx.set_materialize_grads(False)
        return _forward(x, weight, state, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, state, starts = ctx.saved_tensors
        grads = [tensor.new_zeros(tensor.shape) for tensor in (x, weight, state)]
        upstream = {"grad_y": grad_y, "grad_final": grad_final}
        outputs = dict(zip(_GRADS, grads, strict=True))
        _run("srwm_cpu_short_conv_backward", x, weight, state, starts, **upstream, **outputs)
        return *grads, None


def _forward(x: Tensor, weight: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    y, final = x.new_empty(x.shape), state.new_empty(state.shape)
    _run("srwm_cpu_short_conv_forward", x, weight, state, starts, y=y, final=final)
    return y, final


def _run(function: str, x: Tensor, weight: Tensor, state: Tensor, starts: Tensor, **more: Tensor | None) -> None:
    kernel = load_kernel()
    assert not isinstance(kernel, str)
    (n_steps, batch, channels), width = x.shape, len(weight)
    tensors = {"x": x, "weight": weight, "state": state, "starts": starts, **more}
    packed = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    job = _Conv(n_steps, batch, channels, width, **{name: tensor.data_ptr() for name, tensor in packed.items()})
    getattr(kernel.library, function)(ctypes.byref(job), kernel.level)
