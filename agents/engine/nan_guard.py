"""Numbers that are not finite: found before they reach a weight, and named."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from srwm_rl.agents.engine.transfer import to_host
from srwm_rl.errors import FaultError
from srwm_rl.nn.policy import ActStep, SRWMPolicy

OnNan = Literal["stop", "skip"]
ON_NAN = ("stop", "skip")
logger = logging.getLogger(__name__)


class CheckedStep(NamedTuple):
    """What was done for B environments."""

    step: ActStep
    core_state: Tensor  # [L, B, S], with which it began
    actions: np.ndarray  # [B, ...], the step's, on the host


class NanGuard:
    """Check what a trainer is about to learn from or to write into its weights.

    Args:
        on_nan: "stop" raises `FaultError`; "skip" leaves out the step at which the number turned up (an observation or
            reward counts as 0, an environment's memory is emptied, an update is not made) and logs what it did.

    Attributes:
        skipped: how many steps and updates were left out.
    """

    def __init__(self, on_nan: OnNan) -> None:
        self.on_nan = on_nan
        self.skipped = 0

    def fault(self, what: str, remedy: str) -> None:
        """Raise, or say what is done instead.

        Raises:
            FaultError: "stop".
        """
        if self.on_nan == "stop":
            raise FaultError(what)
        self.skipped += 1
        if self.skipped <= 10:
            logger.warning("%s; %s%s", what, remedy, " (further ones are only counted)" * (self.skipped == 10))

    def arrays(self, what: str, values: Any, step: int, numbers: Sequence[int]) -> Any:
        """Return observations or rewards with 0 where they are not finite.

        Args:
            what: they are.
            values: `[B, ...]`, or a dict of such.
            step: environment steps so far.
            numbers: of the environments they come from, `[B]`.

        Raises:
            FaultError: "stop".
        """
        if isinstance(values, dict):
            if all(map(_finite, values.values())):
                return values
            return {key: self.arrays(f"{what} {key!r}", each, step, numbers) for key, each in values.items()}
        if _finite(values):
            return values
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        self.fault(f"the {what} of environment {numbers[bad[0]]} is not finite at step {step:,}", "it counts as 0")
        return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)

    def act(
        self,
        policy: SRWMPolicy,
        obs: Any,
        core_state: Tensor,
        episode_starts: Tensor,
        step: int,
        act: Callable[[Any, Tensor, Tensor], ActStep],
        numbers: Sequence[int],
    ) -> CheckedStep:
        """Act, and see that what comes out is finite.

        Args:
            policy: that acts.
            obs: `[B, ...]` or a dict of such.
            core_state: `[L, B, S]`.
            episode_starts: `[B]`.
            step: environment steps so far.
            act: `policy.act`, or what does the same faster.
            numbers: of the environments acted for, `[B]`.

        Returns:
            What was done; a sick core state was emptied before.

        Raises:
            FaultError: "stop", or weights that are sick themselves, for which nothing can be left out.
        """
        with torch.no_grad():
            acted = _try_to_act(act, obs, core_state, episode_starts)
            if acted is not None:
                return acted
            obs = self._finite_obs(obs, step, numbers)
            core_state = self.memory(core_state, step, numbers)
            acted = _try_to_act(policy.act, obs, core_state, episode_starts)
            if acted is None:
                where = _first_sick_module(policy, obs, core_state, episode_starts)
                raise FaultError(f"the policy's output is not finite at step {step:,}: {where}")
            return acted

    def memory(self, core_state: Tensor, step: int, numbers: Sequence[int]) -> Tensor:
        """Return the core state `[L, B, S]` of environments with these numbers, with zeros for each that is not finite.

        Raises:
            FaultError: "stop".
        """
        sick = ~torch.isfinite(core_state).all(dim=2)  # [L, B]
        if not sick.any():
            return core_state
        layer, env = sick.nonzero()[0].tolist()
        place = f"layer {layer}, environment {numbers[env]}"
        self.fault(f"the fast weights are not finite at step {step:,} ({place})", "that memory is emptied")
        return core_state.masked_fill(sick.any(dim=0)[None, :, None], 0.0)

    def _finite_obs(self, obs: Any, step: int, numbers: Sequence[int]) -> Any:
        if isinstance(obs, dict):
            return {key: self._finite_obs(each, step, numbers) for key, each in obs.items()}
        return torch.as_tensor(self.arrays("observation", obs.cpu().numpy(), step, numbers), device=obs.device)

    def update(self, numbers: dict[str, float], sick_gradient: Callable[[], str | None], number: int) -> bool:
        """Say whether an update may be made.

        Args:
            numbers: the loss's terms by name, and `grad_norm`, that of the whole gradient before clipping.
            sick_gradient: names the first parameter whose gradient is not finite; None: there is none.
            number: which update it is.

        Raises:
            FaultError: "stop".
        """
        if all(map(math.isfinite, numbers.values())):
            return True
        loss = [name.replace("_", " ") for name, each in numbers.items() if not math.isfinite(each)]
        loss = [name for name in loss if name != "grad norm"]
        if {"policy loss", "entropy"} <= set(loss):  # which have nothing else in common
            self.fault(f"the policy's logits are not finite in update {number:,}", "the update is left out")
            return False
        gradient = sick_gradient()
        parts = [f"the {name}" for name in loss[:1]] + [f"the gradient of {gradient}"] * (gradient is not None)
        what = " and ".join(parts) or "the gradient's norm"
        self.fault(f"{what} is not finite in update {number:,}", "the update is left out")
        return False


def first_sick_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """Name the first parameter whose gradient is not finite."""
    for name, each in parameters:
        if each.grad is not None and not torch.isfinite(each.grad).all():
            return name
    return None


def _try_to_act(
    act: Callable[[Any, Tensor, Tensor], ActStep], obs: Any, core_state: Tensor, episode_starts: Tensor
) -> CheckedStep | None:
    try:
        step = act(obs, core_state, episode_starts)
    except ValueError as error:
        if not str(error).startswith("Expected "):  # so torch's distributions refuse what is not finite
            raise
        return None
    # All at once: a GPU is waited for here, once in a step.
    actions, values, log_probs = to_host(step.actions, step.values, step.log_probs)
    return CheckedStep(step, core_state, actions) if _finite(values) and _finite(log_probs) else None


def _finite(values: np.ndarray) -> bool:
    """Say whether all of an array's numbers are finite."""
    # A sum of squares is finite only if all of them are, and takes a third of the time; it may be too large, though.
    return values.dtype.kind != "f" or math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def _first_sick_module(policy: SRWMPolicy, obs: Any, core_state: Tensor, episode_starts: Tensor) -> str:
    """Name the first weight that is not finite, or else the first module whose output is not."""
    for name, parameter in policy.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weight {name} is sick"
    with _watched(policy) as sick, suppress(ValueError):
        policy.act(obs, core_state, episode_starts)
    return f"first in the output of {sick[0]}" if sick else "in the action distribution"


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[str]]:
    """Collect, in the order of their computation, the names of modules whose output is not finite."""
    sick: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(each, Tensor) and not torch.isfinite(each).all() for each in tensors):
                sick.append(name)

        return hook

    handles = [each.register_forward_hook(note(name)) for name, each in module.named_modules() if name]
    try:
        yield sick
    finally:
        for handle in handles:
            handle.remove()
