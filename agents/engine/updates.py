"""Optimizer steps that are made only with finite gradients, checked before each step or on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from srwm_rl.agents.engine.nan_guard import NanGuard, non_finite_gradients
from srwm_rl.nn.policy import SRWMPolicy


def make_updates(
    guard: NanGuard, policy: SRWMPolicy, parameters: list[Tensor], max_grad_norm: float, defer: bool
) -> CheckedUpdates:
    """Return `DeferredUpdates` where `defer` and the optimizer allow it, on a GPU, else `CheckedUpdates`."""
    deferred = defer and policy.device.type == "cuda" and supports_found_inf(policy.optimizer)
    return (DeferredUpdates if deferred else CheckedUpdates)(guard, policy, parameters, max_grad_norm)


class CheckedUpdates:
    """Optimizer steps, each made after its loss and gradient were read and found finite.

    Args:
        guard: decides what happens when they are not.
        policy: with its optimizer.
        parameters: of the optimizer.
        max_grad_norm: to which the gradient is clipped.

    Attributes:
        means: of the loss's terms, and `grad_norm` before clipping, for every update that passed `check`.
        number: of the update that was read last.
    """

    def __init__(self, guard: NanGuard, policy: SRWMPolicy, parameters: list[Tensor], max_grad_norm: float) -> None:
        self._guard, self._policy, self._parameters, self._max_grad_norm = guard, policy, parameters, max_grad_norm
        self.means: list[dict[str, float]] = []
        self.number = 0

    def check(self, sums: Any, grad_norm: Tensor, n_steps: int, number: int) -> bool:
        """Clip the gradient in the parameters if it and the loss are finite.

        Args:
            sums: a NamedTuple of the loss's terms `[]`, summed over steps.
            grad_norm: `[]`, before clipping.
            n_steps: steps of which they are sums.
            number: of the update, for messages.

        Returns:
            False if the update must be skipped.

        Raises:
            FaultError: not finite, and `on_nan` is "stop".
        """
        values = torch.stack((*sums, grad_norm)).tolist()
        non_finite = non_finite_gradients(self._policy.named_parameters())
        if not self._read(number, n_steps, sums._fields, values, non_finite):
            return False
        if values[-1] >= self._max_grad_norm:  # else the factor is one
            # As torch.nn.utils.clip_grads_with_norm_, whose grouping by device takes three times as long.
            grads = [weight.grad for weight in self._parameters if weight.grad is not None]
            torch._foreach_mul_(grads, self._max_grad_norm / (grad_norm + 1e-6))
        return True

    def _read(
        self, number: int, n_steps: int, names: Sequence[str], values: list[float], non_finite: Iterable[str]
    ) -> bool:
        """Add the means of an update's numbers; return False if it is not finite; see `NanGuard.check_update`."""
        self.number = number
        numbers = dict(zip((*names, "grad_norm"), values, strict=True))
        if not self._guard.check_update(numbers, non_finite, number):
            return False
        self.means.append({name: x if name == "grad_norm" else x / n_steps for name, x in numbers.items()})
        return True

    def step(self) -> None:
        """Make the optimizer step that `check` allowed."""
        self._policy.optimizer.step()

    def flush(self) -> list[dict[str, float]]:
        """Return `means`, all updates included."""
        return self.means


class DeferredUpdates(CheckedUpdates):
    """Optimizer steps made without waiting for the GPU; updates that are not finite are skipped on the device.

    The optimizer leaves weights and its own state unchanged where `found_inf`, a tensor on the device, is 1, as under
    `torch.amp.GradScaler`. With `on_nan="stop"` it skips all later updates, too. Weights and messages are those of
    `CheckedUpdates`.
    """

    def __init__(self, guard: NanGuard, policy: SRWMPolicy, parameters: list[Tensor], max_grad_norm: float) -> None:
        super().__init__(guard, policy, parameters, max_grad_norm)
        self._optimizer: Any = policy.optimizer
        self._named = [*policy.named_parameters()]
        self._rows: list[Tensor] = []  # for each update the terms, the norm, and the largest number of each gradient
        self._pending: list[tuple[int, int, Sequence[str], list[str]]] = []  # number, n_steps, names of both
        self._found_inf = torch.zeros((), device=policy.device)

    def check(self, sums: Any, grad_norm: Tensor, n_steps: int, number: int) -> bool:
        """Clip the gradient and record what to read later; arguments as in `CheckedUpdates`. Always returns True."""
        gradients = {name: weight.grad for name, weight in self._named if weight.grad is not None}
        numbers = torch.stack((*sums, grad_norm))
        self._rows += [torch.stack([*numbers, *torch._foreach_norm([*gradients.values()], torch.inf)])]
        self._pending.append((number, n_steps, sums._fields, [*gradients]))
        non_finite = torch.isfinite(numbers).all().logical_not().float()
        stop = self._guard.on_nan == "stop"
        self._found_inf = torch.maximum(self._found_inf, non_finite) if stop else non_finite
        norm_or_zero = grad_norm.where(grad_norm >= self._max_grad_norm, 0.0)  # 0: the factor is one
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm_or_zero)
        return True

    def step(self) -> None:
        """Make the optimizer step, unless it is skipped on the device."""
        self._optimizer.grad_scale, self._optimizer.found_inf = None, self._found_inf
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.grad_scale, self._optimizer.found_inf

    def flush(self) -> list[dict[str, float]]:
        """Wait for the device, and return the means of the updates that were made, in order.

        Raises:
            FaultError: `on_nan` is "stop", for the first update that is not finite.
        """
        values = iter(torch.cat(self._rows).tolist() if self._rows else [])
        for number, n_steps, names, gradients in self._pending:
            numbers = [*islice(values, len(names) + 1)]
            non_finite = [name for name, x in zip(gradients, values, strict=False) if not math.isfinite(x)]
            self._read(number, n_steps, names, numbers, non_finite)
        self._rows, self._pending = [], []
        return self.means


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer skips a step where its `found_inf`, a tensor on the device, is 1."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
