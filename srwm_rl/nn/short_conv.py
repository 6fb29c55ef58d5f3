"""The short causal convolution before a stack's memory layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srwm_rl.ops.checks import refuse_tracing
from srwm_rl.ops.short_conv import short_conv

_EARLIER_INIT = 0.3  # standard deviation of the taps of earlier inputs


class ShortConv(nn.Module):
    """Depthwise causal convolution over the last `width` steps: each channel weighs its own last inputs.

    `y[t] = sum_j weight[j] * x[t - j]`, as before the memories of Mamba (Gu and Dao, 2023,
    https://arxiv.org/abs/2312.00752) and Gated DeltaNet (Yang et al., 2024, https://arxiv.org/abs/2412.06464), without
    their activation and bias. Inputs from before the episode's start count as 0. The present input's tap is initialised
    to 1, the others to 0.3 times a standard normal number.

    Args:
        channels: C.
        width: W, steps per output; at least 2.

    Attributes:
        weight: `[W, C]`, the present input's tap first.
        state_size: floats of state per environment: the last `W - 1` inputs, the newest first.
        input_shape: of one step of `recur`.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.state_size = (width - 1) * channels
        self.input_shape = (channels,)
        self.weight = nn.Parameter(torch.empty(width, channels))
        with torch.no_grad():
            self.weight.normal_(std=_EARLIER_INIT)
            self.weight[0] = 1

    def recur(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Map `x` `[T, B, C]`, `state` `[B, state_size]` and `episode_starts` `[T, B]` to the output and new state."""
        refuse_tracing("a short convolution")
        y, inputs = short_conv(x, self.weight, state.unflatten(-1, (-1, x.shape[-1])), episode_starts)
        return y, inputs.flatten(1)

    forward = recur
