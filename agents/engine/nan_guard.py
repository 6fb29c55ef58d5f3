"""Checks for NaN and infinity in observations, rewards, core states, actions and gradients before a weight changes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from srwm_rl.agents.engine.transfer import map_obs, to_device
from srwm_rl.errors import FaultError
from srwm_rl.nn.policy import ActStep, SRWMPolicy

OnNan = Literal["stop", "skip"]
ON_NAN = ("stop", "skip")
MAX_WARNINGS = 10
logger = logging.getLogger(__name__)


class NanGuard:
    """Checks what a trainer is about to learn from or to write into its weights.

    Args:
        on_nan: "stop" raises `FaultError`; "skip" replaces observations and rewards by 0, resets the core state of the
            environment or skips the update, and logs a warning.

    Attributes:
        skipped: number of replaced, reset or skipped things.
    """

    def __init__(self, on_nan: OnNan) -> None:
        self.on_nan = on_nan
        self.skipped = 0

    def fault(self, message: str, remedy: str) -> None:
        """Raise, or count the fault and warn of the remedy that the caller applies.

        Raises:
            FaultError: `on_nan` is "stop".
        """
        if self.on_nan == "stop":
            raise FaultError(message)
        self.skipped += 1
        if self.skipped <= MAX_WARNINGS:
            last = " (further ones are only counted)" * (self.skipped == MAX_WARNINGS)
            logger.warning("%s; %s%s", message, remedy, last)

    def check_arrays(self, name: str, values: Any, step: int, env_indices: Sequence[int]) -> Any:
        """Return observations or rewards with 0 where they are not finite.

        Args:
            name: of the values in messages.
            values: `[B, ...]`, or a dict of such.
            step: environment steps so far.
            env_indices: of the environments, `[B]`.

        Raises:
            FaultError: `on_nan` is "stop".
        """
        if isinstance(values, dict):
            if all(map(_finite, values.values())):
                return values
            return {key: self.check_arrays(f"{name} {key!r}", x, step, env_indices) for key, x in values.items()}
        if _finite(values):
            return values
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        self.fault(f"the {name} of environment {env_indices[bad[0]]} is not finite at step {step:,}", "it counts as 0")
        return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)

    def act(
        self,
        policy: SRWMPolicy,
        obs: Any,
        core_state: Tensor,
        episode_starts: np.ndarray,
        step: int,
        act: Callable[[Any, Tensor, np.ndarray], ActStep],
        env_indices: Sequence[int],
    ) -> tuple[ActStep, Tensor]:
        """Act, and check that values and log-probabilities are finite.

        Args:
            policy, core_state: see `SRWMPolicy.act`.
            obs, episode_starts: arrays `[B, ...]` and `[B]`.
            step: environment steps so far.
            act: acts as `policy.act`; of its result, only the core state is not on the host.
            env_indices: of the environments, `[B]`.

        Returns:
            The step, as of `act`, and the core state with which it began (those that are not finite are reset).

        Raises:
            FaultError: `on_nan` is "stop"; or the weights themselves are not finite.
        """
        with torch.no_grad():
            acted = act(obs, core_state, episode_starts)
            if not _is_finite(acted):
                arrays = self.check_arrays("observation", obs, step, env_indices)
                core_state = self.check_state(core_state, step, env_indices)
                move = partial(to_device, device=core_state.device)
                args = map_obs(move, arrays), core_state, move(episode_starts)
                *results, state = policy.act(*args)
                acted = ActStep._make([*(tensor.cpu() for tensor in results), state])
                if not _is_finite(acted):
                    origin = _first_non_finite_module(policy, *args)
                    raise FaultError(f"the policy's output is not finite at step {step:,}: {origin}")
            return acted, core_state

    def check_state(self, core_state: Tensor, step: int, env_indices: Sequence[int]) -> Tensor:
        """Return the core state `[L, B, S]` with zeros for each environment whose state is not finite.

        Raises:
            FaultError: `on_nan` is "stop".
        """
        non_finite = ~torch.isfinite(core_state).all(dim=2)  # [L, B]
        if not non_finite.any():
            return core_state
        layer, env = non_finite.nonzero()[0].tolist()
        origin = f"layer {layer}, environment {env_indices[env]}"
        self.fault(f"the fast weights are not finite at step {step:,} ({origin})", "that core state is reset")
        return core_state.masked_fill(non_finite.any(dim=0)[None, :, None], 0.0)

    def check_update(self, numbers: dict[str, float], non_finite: Iterable[str], number: int) -> bool:
        """Return whether an update may be made.

        Args:
            numbers: the loss's terms by name, and `grad_norm`, the norm of the whole gradient before clipping.
            non_finite: names of the parameters whose gradient is not finite.
            number: of the update.

        Raises:
            FaultError: `on_nan` is "stop".
        """
        if all(map(math.isfinite, numbers.values())):
            return True
        loss = [name.replace("_", " ") for name, x in numbers.items() if name != "grad_norm" and not math.isfinite(x)]
        if {"policy loss", "entropy"} <= set(loss):  # only the logits enter both
            origin, are = "the policy's logits", "are"
        else:
            gradients = [f"the gradient of {name}" for name in islice(non_finite, 1)]
            origin = " and ".join([*(f"the {name}" for name in loss[:1]), *gradients]) or "the gradient's norm"
            are = "is"
        self.fault(f"{origin} {are} not finite in update {number:,}", "the update is skipped")
        return False


def non_finite_gradients(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[str]:
    """Yield the names of the parameters whose gradient is not finite."""
    for name, parameter in parameters:
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            yield name


def _is_finite(step: ActStep) -> bool:
    return _finite(step.values.numpy()) and _finite(step.log_probs.numpy())


def _finite(values: np.ndarray) -> bool:
    """Return whether all numbers of an array are finite."""
    # The sum of squares takes a third of the time of isfinite; it may overflow, though.
    return values.dtype.kind != "f" or math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def _first_non_finite_module(policy: SRWMPolicy, obs: Any, core_state: Tensor, episode_starts: Tensor) -> str:
    """Name the first weight that is not finite, or else the first module whose output is not."""
    for name, parameter in policy.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weight {name} is not finite"
    names: list[str] = []

    def check(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if any(isinstance(tensor, Tensor) and not torch.isfinite(tensor).all() for tensor in tensors):
            names.append(name)

    with ExitStack() as hooks:
        for name, module in policy.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(check, name)))
        policy.act(obs, core_state, episode_starts)
    return f"first in the output of {names[0]}" if names else "in the action distribution"
