"""`srwm_scan`: checks the arguments and calls a backend."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from srwm_rl.ops import cpu
from srwm_rl.ops.backends import check_backend, choose
from srwm_rl.ops.checks import (
    as_uint8,
    check_bound,
    check_input,
    check_starts,
    check_tensor,
    in_float32,
    is_autocast,
    refuse_tracing,
)
from srwm_rl.ops.reference import srwm_scan_reference


def srwm_scan(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    episode_starts: Tensor | None = None,
    *,
    retention: Tensor | None = None,
    shift_bound: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run a self-referential weight matrix over a whole unroll, episode resets inside.

    One head, one step, with `W = weight + shift` (Irie et al., ICML 2022, eqs. 5-9, https://arxiv.org/abs/2202.05780):

        y, q, k, beta = split(x @ W);   q, k = softmax(q), softmax(k);   rate = sigmoid(beta)
        W <- W + k outer (rate * ((q - k) @ W)),   one rate for each of the four column groups y, q, k, beta

    Gradients flow through time to `x`, to all four column groups of `weight`, to `shift` and to `retention`. Under
    `torch.autocast` it computes in float32.

    Args:
        x: `[T, B, H, D]`, floating point, the layer's input after its own mapping; T >= 1.
        weight: `[H, D, E+2D+4]`, the slow weight; columns `y | q | k | beta`. E, the width of `y`, is usually D.
            Same dtype and device as `x`.
        shift: `[B, H, D, E+2D+4]`, fast minus slow weight at the unroll's start; None: zeros, a new episode.
        episode_starts: `[T, B]`, bool or number: where non-zero the shift is zeroed *before* that step.
        retention: `[T, B, H]` in [0, 1], how much of the shift each step keeps: `shift <- retention * shift + edit`, so
            that old edits fade and the slow weight returns; None: all of it.
        shift_bound: number above 0 (1e-12 to 1e12), the largest Frobenius norm of a head's shift, over all its columns:
            after each step's edit `shift <- shift * min(1, shift_bound / |shift|)`; None: any.
        backend: "auto" selects the device's fused kernel ("cpu": C, float32 and float64; "triton": CUDA, float32) or,
            if there is none, the reference, and logs the reason once; "reference" is plain PyTorch, the only one with
            second derivatives, with forward-mode ones and under `torch.func.grad`, where "auto" selects it.

    Returns:
        `y` `[T, B, H, E]` and the final `shift` `[B, H, D, E+2D+4]`.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit or cannot run; the message names the argument.
    """
    check_backend("srwm_scan", backend)
    refuse_tracing("srwm_scan")
    if is_autocast(x):
        with torch.autocast(x.device.type, enabled=False):
            x, weight, shift, retention = in_float32(x, weight, shift, retention)
            return srwm_scan(
                x, weight, shift, episode_starts, retention=retention, shift_bound=shift_bound, backend=backend
            )
    _check(x, weight, shift, episode_starts, retention)
    if shift_bound is not None:
        check_bound(shift_bound)
    if x.numel() == 0:
        backend = "reference"
    # index() turns torch.compile's symbols into numbers: the backend is chosen when compiling.
    size, columns = index(x.shape[-1]), index(weight.shape[-1])
    chosen: str = choose("srwm_scan", backend, x.device.type, x.dtype, size, columns - 2 * size - 4)
    if chosen == "reference":
        return srwm_scan_reference(x, weight, shift, episode_starts, retention, shift_bound)
    starts = as_uint8(episode_starts)
    if chosen == "cpu":
        return cpu.scan(x, weight, retention, shift, starts, shift_bound)
    from srwm_rl.ops import triton_scan  # here: triton is not installed everywhere

    return triton_scan.scan(x, weight, retention, shift, starts, shift_bound)


def _check(
    x: Tensor, weight: Tensor, shift: Tensor | None, episode_starts: Tensor | None, retention: Tensor | None
) -> None:
    check_input("x", x)
    n_steps, batch, heads, size = x.shape
    columns = weight.shape[-1] if weight.dim() else 0
    if columns <= 2 * size + 4:
        raise ValueError(
            f"weight must be [H, D, E+2D+4], {[heads, size, 3 * size + 4]} where y is as wide as x, for x "
            f"{list(x.shape)}, not {list(weight.shape)}"
        )
    check_tensor("weight", weight, (heads, size, columns), "x", x)
    if shift is not None:
        check_tensor("shift", shift, (batch, heads, size, columns), "x", x)
    if retention is not None:
        check_tensor("retention", retention, (n_steps, batch, heads), "x", x)
    check_starts(episode_starts, "x", x)
