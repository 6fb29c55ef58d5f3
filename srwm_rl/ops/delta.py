"""`delta_scan`: fast weights written by the delta rule, the memory of the Delta Net."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from srwm_rl.ops import cpu
from srwm_rl.ops.backends import check_backend, choose
from srwm_rl.ops.checks import (
    as_uint8,
    check_input,
    check_starts,
    check_tensor,
    in_float32,
    is_autocast,
    refuse_tracing,
)
from srwm_rl.ops.reference import delta_scan_reference


def delta_scan(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    rate: Tensor,
    weight: Tensor | None = None,
    episode_starts: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Write and read a fast weight by the delta rule over a whole unroll, episode resets inside.

    One head, one step (Schlag, Irie, Schmidhuber, ICML 2021, section 4, https://arxiv.org/abs/2102.11174):

        W <- W + k outer (rate * (v - k @ W));   y = q @ W

    The value stored under the key moves towards `v` by the rate; the read comes after the write. Gradients flow through
    time to every argument. Under `torch.autocast` it computes in float32.

    Args:
        key: `[T, B, H, D]`, floating point; T >= 1. If its entries are non-negative and sum to at most
            1, and rates are up to 1, the fast weight stays bounded.
        value: `[T, B, H, D]`, what to store. This and all others: same dtype and device as `key`.
        query: `[T, B, H, D]`, what to read, mapped like the key.
        rate: `[T, B, H]`, 0 writes nothing, 1 (and a key of norm 1) replaces what was there.
        weight: `[B, H, D, D]`, the fast weight at the unroll's start, rows by key, columns by value; None: zeros, a new
            episode.
        episode_starts: `[T, B]`, bool or number: where non-zero the fast weight is zeroed *before* that step.
        backend: "auto" selects the device's fused kernel ("cpu": C, float32 and float64; "triton": CUDA, float32) or,
            if it cannot run, the reference, and logs the reason once; "reference" is plain PyTorch, the only one with
            second derivatives, with forward-mode ones and under `torch.func.grad`, where "auto" selects it.

    Returns:
        `y` `[T, B, H, D]` and the final fast weight `[B, H, D, D]`.

    Raises:
        ValueError: a shape, dtype, device or backend that does not fit or cannot run; the message names the argument.
    """
    check_backend("delta_scan", backend)
    refuse_tracing("delta_scan")
    if is_autocast(key):
        with torch.autocast(key.device.type, enabled=False):
            key, value, query, rate, weight = in_float32(key, value, query, rate, weight)
            return delta_scan(key, value, query, rate, weight, episode_starts, backend=backend)
    check_input("key", key)
    n_steps, batch, heads, size = key.shape
    for name, tensor, shape in (
        ("value", value, (n_steps, batch, heads, size)),
        ("query", query, (n_steps, batch, heads, size)),
        ("rate", rate, (n_steps, batch, heads)),
        ("weight", weight, (batch, heads, size, size)),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape, "key", key)
    check_starts(episode_starts, "key", key)
    if key.numel() == 0:
        backend = "reference"
    chosen: str = choose("delta_scan", backend, key.device.type, key.dtype, index(size))
    if chosen == "reference":
        return delta_scan_reference(key, value, query, rate, weight, episode_starts)
    starts = as_uint8(episode_starts)
    if chosen == "cpu":
        return cpu.delta_scan(key, value, query, rate, weight, starts, None)
    from srwm_rl.ops import triton_delta  # here: triton is not installed everywhere

    return triton_delta.delta_scan(key, value, query, rate, weight, starts, None)
