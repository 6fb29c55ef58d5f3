"""Updates that are made before anybody has read their numbers: the device itself withholds those that are sick."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srwm_rl.agents.engine.nan_guard import NanGuard
from srwm_rl.nn.policy import SRWMPolicy


class _Entry(NamedTuple):
    """An update whose numbers are on the device."""

    terms: tuple[str, ...]
    n_steps: int
    number: int
    gradients: list[tuple[str, int]]  # their parameters' names and sizes, in the order of the numbers


class DeferredUpdates:
    """Make updates without waiting for the device, and read what they were afterwards, all together.

    An update that is not finite is not made: the optimizer leaves weights and its own state as they are where a number
    on the device tells it to. With "stop" it makes none after that either. What is sick and what is done about it is
    as where every update is read at once (`NanGuard.update`), and so are the weights.

    Args:
        guard: judges what is read.
        policy: with an optimizer that `supports_found_inf`.
        max_grad_norm: to which a gradient's norm is clipped.

    Attributes:
        number: of the update that was judged last.
    """

    def __init__(self, guard: NanGuard, policy: SRWMPolicy, max_grad_norm: float) -> None:
        self._nan_guard, self._max_grad_norm = guard, max_grad_norm
        self._optimizer: Any = policy.optimizer
        self._parameters = [*policy.named_parameters()]
        self._rows: list[Tensor] = []  # [n + 3] each: the terms, the norm, whether and where the gradient is sick
        self._entries: list[_Entry] = []
        self._withheld = torch.zeros((), device=policy.device)  # 1: updates are not to be made
        self.number = 0

    def step(self, terms: Any, grad_norm: Tensor, n_steps: int, number: int) -> None:
        """Make an update with the gradient that is in the parameters, unless something in it is not finite.

        Args:
            terms: a NamedTuple of the loss's terms, summed over steps.
            grad_norm: of the gradient before clipping.
            n_steps: how many steps the terms are sums of.
            number: which update it is.
        """
        with_gradient = [(name, each) for name, each in self._parameters if each.grad is not None]
        numbers = torch.stack((*terms, grad_norm))
        sick_gradient = _first_sick([each.grad for _, each in with_gradient if each.grad is not None], numbers)
        self._rows.append(torch.cat((numbers.double(), sick_gradient)))
        sizes = [(name, each.numel()) for name, each in with_gradient]
        self._entries.append(_Entry(terms._fields, n_steps, number, sizes))
        sick = torch.isfinite(numbers).all().logical_not().float()
        stop = self._nan_guard.on_nan == "stop"
        self._withheld = torch.maximum(self._withheld, sick) if stop else sick
        weights = [each for group in self._optimizer.param_groups for each in group["params"]]
        clipped_by = grad_norm.where(grad_norm >= self._max_grad_norm, 0.0)  # 0: it multiplies by one
        torch.nn.utils.clip_grads_with_norm_(weights, self._max_grad_norm, clipped_by)
        self._optimizer.grad_scale, self._optimizer.found_inf = None, self._withheld  # as torch.amp.GradScaler does
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.grad_scale, self._optimizer.found_inf

    def read(self) -> list[dict[str, float]]:
        """Wait for the device, and return the means of the updates that were made, in their order.

        Raises:
            FaultError: "stop", for the first update that is not finite.
        """
        means = []
        rows = torch.stack(self._rows).tolist() if self._rows else []
        for entry, row in zip(self._entries, rows, strict=True):
            *numbers, any_sick, where = row
            self.number = entry.number
            by_name = dict(zip((*entry.terms, "grad_norm"), numbers, strict=True))
            name = _at(entry.gradients, int(where)) if any_sick else None
            if self._nan_guard.update(by_name, lambda name=name: name, entry.number):  # type: ignore[misc]
                means.append(means_of(by_name, entry.n_steps))
        self._rows, self._entries = [], []
        return means


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether an optimizer leaves out a step where `found_inf`, a number on the device, is 1."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def means_of(numbers: dict[str, float], n_steps: int) -> dict[str, float]:
    """Divide terms by the steps that they are sums of; `grad_norm` is none."""
    return {name: each if name == "grad_norm" else each / n_steps for name, each in numbers.items()}


def _first_sick(grads: list[Tensor], like: Tensor) -> Tensor:
    """Return, `[2]` of float64, whether a gradient is not finite, and where, if all of them stood in one row."""
    if not grads:
        return torch.zeros(2, dtype=torch.float64, device=like.device)
    sick = torch.isfinite(torch.cat([each.reshape(-1) for each in grads])).logical_not().byte()
    return torch.stack((sick.amax().double(), sick.argmax().double()))


def _at(sizes: list[tuple[str, int]], place: int) -> str:
    """Return the name of the part in which a place of the row lies."""
    ends = list(accumulate(size for _, size in sizes))
    return sizes[bisect_right(ends, place)][0]
