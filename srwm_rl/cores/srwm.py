"""The self-referential weight matrix as a policy's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from srwm_rl.cores.base import Core
from srwm_rl.errors import UserError, did_you_mean
from srwm_rl.layers import FeedForwardBlock, Norm, SRWMLayer

# Where the published RL agent differs: IDSIA/modern-srwm, reinforcement_learning/torchbeast/layer.py, class SRlayer.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"input_softmax": False, "norm": "pre", "query_init": 0.01, "beta_init": 0.0},
    "paper": {"input_softmax": True, "norm": "none", "query_init": 1.0, "beta_init": 0.0},
}


class SRWMCore(Core):
    """Input projection, then layers of self-modifying heads, each followed by a feed-forward block.

    The state holds, per layer, the shift of every head: `S = H * D * (3D+4)`.

    Args:
        input_size: I.
        hidden_size: width of the layers and of the output.
        n_layers: L.
        n_heads: H; `D = hidden_size / H`.
        ff_size: inner width of the feed-forward blocks; None: four times `hidden_size`, as published.
        variant: "default", or "paper" for the published layer exactly; sets the four settings below where None.
        input_softmax, norm, query_init, beta_init: see `srwm_rl.layers.SRWMLayer`.

    Raises:
        UserError: an unknown variant or norm, or sizes that do not divide.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 128,
        n_layers: int = 2,
        n_heads: int = 8,
        ff_size: int | None = None,
        variant: str = "default",
        input_softmax: bool | None = None,
        norm: Norm | None = None,
        query_init: float | None = None,
        beta_init: float | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise UserError(f"unknown SRWM variant {variant!r}{did_you_mean(variant, VARIANTS)}")
        chosen = {"input_softmax": input_softmax, "norm": norm, "query_init": query_init, "beta_init": beta_init}
        settings = VARIANTS[variant] | {name: value for name, value in chosen.items() if value is not None}
        head_size = hidden_size // n_heads
        self.shift_shape = (n_heads, head_size, 3 * head_size + 4)  # [H, D, 3D+4]
        super().__init__(input_size, hidden_size, n_layers, n_heads * head_size * (3 * head_size + 4))
        self.project = nn.Linear(input_size, hidden_size)
        self.layers = nn.ModuleList(SRWMLayer(hidden_size, n_heads, **settings) for _ in range(n_layers))
        self.blocks = nn.ModuleList(FeedForwardBlock(hidden_size, ff_size or 4 * hidden_size) for _ in range(n_layers))

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll; shapes as in `Core.forward`."""
        shifts = state.unflatten(-1, self.shift_shape)  # [L, B, H, D, 3D+4]
        x = self.project(x)  # [T, B, hidden]
        finals = []
        for layer, block, shift in zip(self.layers, self.blocks, shifts.unbind(0), strict=True):
            x, final = layer(x, shift, episode_starts)
            x = block(x)
            finals.append(final)
        return x, torch.stack(finals).flatten(2)  # [L, B, S]
