"""A core without memory: the control that measures what a task needs memory for."""

from __future__ import annotations

from torch import Tensor, nn

from srwm_rl.nn.cores.base import Core
from srwm_rl.nn.layers import FeedForwardBlock


class FeedForwardCore(Core):
    """The SRWM core without its self-modifying layers: input projection and feed-forward blocks; the state is empty.

    `ff_size` is the inner width of the blocks; None: four times `hidden_size`.
    """

    def __init__(self, input_size: int, hidden_size: int = 128, n_layers: int = 2, ff_size: int | None = None) -> None:
        super().__init__(input_size, hidden_size, 1, 0)
        self.project = nn.Linear(input_size, hidden_size)
        self.blocks = nn.Sequential(
            *(FeedForwardBlock(hidden_size, ff_size or 4 * hidden_size) for _ in range(n_layers))
        )

    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Map `x` `[T, B, I]` to `[T, B, O]` step by step; the empty state passes through."""
        return self.blocks(self.project(x)), state
