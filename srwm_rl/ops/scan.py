"""`srwm_scan`: check the arguments once, then hand them to a backend."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from srwm_rl.ops import cpu
from srwm_rl.ops.reference import srwm_scan_reference

# Each fused backend is a module with `why_not(device_type, dtype, head_size)` and `scan(x, weight, shift, starts)`.
_MODULES = {"cpu": "srwm_rl.ops.cpu", "triton": "srwm_rl.ops.triton_scan"}
_BACKEND_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}
BACKENDS = ("auto", "reference", *_MODULES)
_log = logging.getLogger(__name__)


def srwm_scan(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    episode_starts: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run a self-referential weight matrix over a whole unroll, episode resets inside.

    One head, one step, with `W = weight + shift` (Irie et al., ICML 2022, eqs. 5-9, https://arxiv.org/abs/2202.05780):

        y, q, k, beta = split(x @ W);   q, k = softmax(q), softmax(k);   rate = sigmoid(beta)
        W <- W + k outer (rate * ((q - k) @ W)),   one rate for each of the four column groups y, q, k, beta

    Gradients flow through time to `x`, to all four column groups of `weight`, and to `shift`.

    Args:
        x: `[T, B, H, D]`, floating point, whatever the layer made of its input; T >= 1.
        weight: `[H, D, 3D+4]`, the slow weight; columns `y | q | k | beta`. Same dtype and device as `x`.
        shift: `[B, H, D, 3D+4]`, fast minus slow weight at the unroll's start; None: zeros, a new episode.
        episode_starts: `[T, B]`, bool or number: where non-zero the shift is zeroed *before* that step.
        backend: "auto" picks the fused kernel of the device ("cpu": C, float32 and float64; "triton": CUDA, float32),
            or, where there is none, the reference, and logs why, once; "reference" is plain PyTorch, which is also
            the one with gradients of gradients.

    Returns:
        `y` `[T, B, H, D]` and the final `shift` `[B, H, D, 3D+4]`.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit or cannot run; the message names the argument.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    _check(x, weight, shift, episode_starts)
    if x.numel() == 0:
        backend = "reference"
    chosen: str = _choose(backend, x.device.type, x.dtype, x.shape[-1])
    if chosen == "reference":
        return srwm_scan_reference(x, weight, shift, episode_starts)
    starts = None if episode_starts is None else (episode_starts != 0).view(torch.uint8)
    if chosen == "cpu":
        return cpu.scan(x, weight, shift, starts)
    from srwm_rl.ops import triton_scan  # here: it needs triton, which not every machine has

    return triton_scan.scan(x, weight, shift, starts)


def _choose(backend: str, device_type: str, dtype: torch.dtype, head_size: int) -> str:
    """Return the name of the backend that will run."""
    name = _BACKEND_OF_DEVICE.get(device_type, device_type) if backend == "auto" else backend
    if name == "reference":
        return name
    try:
        why_not = import_module(_MODULES[name]).why_not(device_type, dtype, head_size)
    except ImportError as error:
        why_not = f"{error.name or name} cannot be imported"
    except KeyError:
        why_not = f"no fused kernel for {device_type} tensors"
    if not why_not:
        return name
    if backend != "auto":
        raise ValueError(f"backend {backend!r} cannot run: {why_not}")
    _log_fallback(why_not)
    return "reference"


# What torch.compiler.assume_constant_result sets; calling it would import all of torch's compiler here, for a second.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _log_fallback(why_not: str) -> None:
    _log.warning("srwm_scan runs step by step in plain PyTorch, which is slow: %s", why_not)


def _check(x: Tensor, weight: Tensor, shift: Tensor | None, episode_starts: Tensor | None) -> None:
    if x.dim() != 4 or not x.is_floating_point() or x.shape[0] < 1:
        raise ValueError(f"x must be floating point [T, B, H, D] with T >= 1, not {x.dtype} {list(x.shape)}")
    n_steps, batch, heads, head_size = x.shape
    columns = 3 * head_size + 4
    _check_tensor("weight", weight, x, (heads, head_size, columns))
    if shift is not None:
        _check_tensor("shift", shift, x, (batch, heads, head_size, columns))
    if episode_starts is not None:
        if episode_starts.shape != (n_steps, batch):
            raise ValueError(f"episode_starts must be [T, B] = {[n_steps, batch]}, not {list(episode_starts.shape)}")
        if episode_starts.device != x.device:
            raise ValueError(f"episode_starts is on {episode_starts.device}, x on {x.device}")


def _check_tensor(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} for x {list(x.shape)}, not {list(tensor.shape)}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
