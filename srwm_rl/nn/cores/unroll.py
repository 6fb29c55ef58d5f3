"""Running a core over an unroll, with the gradient through its state cut every so many steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from srwm_rl.nn.cores.base import Core


def run_core(
    core: Core, x: Tensor, state: Tensor, episode_starts: Tensor, bptt: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run a core over `x` `[T, B, I]`, cutting the gradient through its state every `bptt` steps (None: never).

    A core that does not carry its state over runs each step from zeros, as when acting.
    """
    if not core.carries_over:
        n_steps, batch, size = x.shape
        y, state = core(x.reshape(1, n_steps * batch, size), state.repeat(1, n_steps, 1), episode_starts.reshape(1, -1))
        return y.view(n_steps, batch, -1), state[:, -batch:]
    return run_in_segments(core, x, state, episode_starts, bptt)


def run_in_segments(
    recur: Callable[..., tuple[Tensor, Tensor]], x: Tensor, state: Tensor, episode_starts: Tensor, bptt: int | None
) -> tuple[Tensor, Tensor]:
    """Run a recurrence over an unroll, cutting the gradient through its state every `bptt` steps (None: never)."""
    if bptt is None or bptt >= len(x):
        return recur(x, state, episode_starts)
    outputs = []
    for segment, starts in zip(x.split(bptt), episode_starts.split(bptt), strict=True):
        y, state = recur(segment, state.detach(), starts)
        outputs.append(y)
    return torch.cat(outputs), state
