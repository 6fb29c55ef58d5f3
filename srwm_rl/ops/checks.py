"""Argument checks that the public functions of this folder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srwm_rl.errors import UserError


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like_name: str, like: Tensor) -> None:
    """Raise a `ValueError` unless `tensor` has this shape and the dtype and device of the first argument, `like`."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} for {like_name} {list(like.shape)}, not {list(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, {like_name} is {like.dtype} on {like.device}")


def check_float32(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless `tensor` is float32 of this shape on the CPU."""
    if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be torch.float32 {list(shape)} on the CPU, not {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}"
        )


def check_input(name: str, tensor: Tensor) -> None:
    """Raise a `ValueError` unless `tensor` can be an unroll's first argument, `[T, B, H, D]`."""
    if tensor.dim() != 4 or not tensor.is_floating_point() or tensor.shape[0] < 1:
        raise ValueError(
            f"{name} must be floating point [T, B, H, D] with T >= 1, not {tensor.dtype} {list(tensor.shape)}"
        )


def check_starts(episode_starts: Tensor | None, like_name: str, like: Tensor) -> None:
    """Raise a `ValueError` unless `episode_starts` is None or `[T, B]` on the device of `like` `[T, B, ...]`."""
    if episode_starts is None:
        return
    if episode_starts.shape != like.shape[:2]:
        raise ValueError(f"episode_starts must be [T, B] = {list(like.shape[:2])}, not {list(episode_starts.shape)}")
    if episode_starts.device != like.device:
        raise ValueError(f"episode_starts is on {episode_starts.device}, {like_name} on {like.device}")


# Beyond these, the bound's square or its inverse leaves the range of float32.
BOUNDS = (1e-12, 1e12)


def check_bound(shift_bound: float) -> None:
    """Raise a `UserError` unless `shift_bound` is a number above 0, of a size that squares in float32."""
    number = isinstance(shift_bound, (int, float)) and not isinstance(shift_bound, bool)
    if not (number and BOUNDS[0] <= shift_bound <= BOUNDS[1]):
        raise UserError(f"shift_bound must be a number above 0 (1e-12 to 1e12), not {shift_bound!r}")


def refuse_tracing(name: str) -> None:
    """Raise a `UserError` under `torch.jit.trace`, which would record the numbers of one call as constants."""
    if torch._C._get_tracing_state() is not None:
        raise UserError(f"torch.jit.trace cannot record {name}: use torch.export, torch.compile or srwm-rl export")


def is_autocast(tensor: Tensor) -> bool:
    """Return whether `torch.autocast` is on for a tensor's device."""
    kind = tensor.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def in_float32(*tensors: Tensor | None) -> list[Any]:
    """Return tensors of half precision in float32, others as they are."""
    return [None if x is None else x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in tensors]


def as_uint8(episode_starts: Tensor | None) -> Tensor | None:
    """Return the flags in the dtype of the fused kernels."""
    return None if episode_starts is None else (episode_starts != 0).view(torch.uint8)


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor's memory may be read directly, past torch's dispatcher.

    Not so under a compiler, an exporter, `torch.func`, whose tensors have no memory, or a `TorchDispatchMode`, which
    would not see the operation (`make_fx` would record none).
    """
    return (
        type(tensor) is Tensor
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.compiler.is_compiling()
    )
