"""`Core`, the interface of a policy's memory: the state is an argument and a return value."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Core(nn.Module, ABC):
    """A memory between the encoder and the policy's heads.

    A subclass packs its state into one tensor `[L, B, S]` in which zeros mean a new episode, so that trainers, buffers
    and SB3's recurrent classes can store any core's state.

    Attributes:
        input_size: I, width of the encoder's features.
        output_size: O, width of the heads' input.
        state_layers: L. May be 0 for a core without memory.
        state_size: S, floats per layer and environment.
        carries_over: False where the state of one call has no effect on the next (an ablation).
    """

    carries_over: ClassVar[bool] = True

    def __init__(self, input_size: int, output_size: int, state_layers: int, state_size: int) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.state_layers, self.state_size = state_layers, state_size

    @classmethod
    def setting_defaults(cls) -> dict[str, Any] | None:
        """Return the constructor's settings and their defaults; None: it takes any (`**kwargs`)."""
        parameters = inspect.signature(cls).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return None
        return {name: parameter.default for name, parameter in parameters.items() if name != "input_size"}

    def initial_state(self, batch: int) -> Tensor:
        """Return the state of `batch` new episodes, `[L, B, S]` zeros on the core's device."""
        like = next(self.parameters())
        return torch.zeros(self.state_layers, batch, self.state_size, dtype=like.dtype, device=like.device)

    @abstractmethod
    def forward(self, x: Tensor, state: Tensor, episode_starts: Tensor) -> tuple[Tensor, Tensor]:
        """Run over an unroll.

        Args:
            x: `[T, B, I]` features.
            state: `[L, B, S]`, the one returned for the previous unroll.
            episode_starts: `[T, B]`; where non-zero, that environment's state is zeroed *before* the step.

        Returns:
            `y` `[T, B, O]` and the new state `[L, B, S]`.
        """
