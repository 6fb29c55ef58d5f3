"""Optimizer steps that are made only with finite gradients, checked before each step or on the device."""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srwm_rl.agents.engine.nan_guard import NanGuard, first_non_finite_gradient
from srwm_rl.nn.policy import SRWMPolicy


def make_updates(guard: NanGuard, policy: SRWMPolicy, max_grad_norm: float, defer: bool) -> CheckedUpdates:
    """Return `DeferredUpdates` where `defer` and the optimizer allow it, on a GPU, else `CheckedUpdates`."""
    deferred = defer and policy.device.type == "cuda" and supports_found_inf(policy.optimizer)
    return (DeferredUpdates if deferred else CheckedUpdates)(guard, policy, max_grad_norm)


class CheckedUpdates:
    """Optimizer steps, each made after its loss and gradient were read and found finite.

    Args:
        guard: decides what happens when they are not.
        policy: with its optimizer.
        max_grad_norm: to which the gradient is clipped.

    Attributes:
        means: of the loss's terms, and `grad_norm` before clipping, for every update that passed `check`.
        number: of the update that was read last.
    """

    def __init__(self, guard: NanGuard, policy: SRWMPolicy, max_grad_norm: float) -> None:
        self._guard, self._policy, self._max_grad_norm = guard, policy, max_grad_norm
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
        self.number = number
        values = torch.stack((*sums, grad_norm)).tolist()
        numbers = dict(zip((*sums._fields, "grad_norm"), values, strict=True))
        name = partial(first_non_finite_gradient, self._policy.named_parameters())
        if not self._guard.check_update(numbers, name, number):
            return False
        if numbers["grad_norm"] >= self._max_grad_norm:  # else the factor is one
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, grad_norm)
        self.means.append(_means(numbers, n_steps))
        return True

    def step(self) -> None:
        """Make the optimizer step that `check` allowed."""
        self._policy.optimizer.step()

    def flush(self) -> list[dict[str, float]]:
        """Return `means`, all updates included."""
        return self.means

    @property
    def _parameters(self) -> list[Tensor]:
        return [weight for group in self._policy.optimizer.param_groups for weight in group["params"]]


class _Pending(NamedTuple):
    """An update whose numbers are still on the device."""

    fields: tuple[str, ...]
    n_steps: int
    number: int
    gradients: list[tuple[str, int]]  # names and sizes of the parameters, in the order of their gradients


class DeferredUpdates(CheckedUpdates):
    """Optimizer steps made without waiting for the GPU; updates that are not finite are skipped on the device.

    The optimizer leaves weights and its own state unchanged where `found_inf`, a tensor on the device, is 1, as under
    `torch.amp.GradScaler`. With `on_nan="stop"` it skips all later updates, too. Weights and messages are those of
    `CheckedUpdates`.
    """

    def __init__(self, guard: NanGuard, policy: SRWMPolicy, max_grad_norm: float) -> None:
        super().__init__(guard, policy, max_grad_norm)
        self._optimizer: Any = policy.optimizer
        self._named = [*policy.named_parameters()]
        self._rows: list[Tensor] = []  # [n + 3]: the terms, the norm, whether and where a gradient is not finite
        self._pending: list[_Pending] = []
        self._found_inf = torch.zeros((), device=policy.device)

    def check(self, sums: Any, grad_norm: Tensor, n_steps: int, number: int) -> bool:
        """Clip the gradient and record what to read later; arguments as in `CheckedUpdates`. Always returns True."""
        gradients = [(name, weight.grad) for name, weight in self._named if weight.grad is not None]
        numbers = torch.stack((*sums, grad_norm))
        self._rows.append(torch.cat((numbers.double(), _first_non_finite([grad for _, grad in gradients], numbers))))
        sizes = [(name, grad.numel()) for name, grad in gradients]
        self._pending.append(_Pending(sums._fields, n_steps, number, sizes))
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
        rows = torch.stack(self._rows).tolist() if self._rows else []
        for pending, (*values, any_non_finite, position) in zip(self._pending, rows, strict=True):
            self.number = pending.number
            numbers = dict(zip((*pending.fields, "grad_norm"), values, strict=True))
            name = _name_at(pending.gradients, int(position)) if any_non_finite else None
            if self._guard.check_update(numbers, lambda name=name: name, pending.number):  # type: ignore[misc]
                self.means.append(_means(numbers, pending.n_steps))
        self._rows, self._pending = [], []
        return self.means


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer skips a step where its `found_inf`, a tensor on the device, is 1."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _means(numbers: dict[str, float], n_steps: int) -> dict[str, float]:
    return {name: value if name == "grad_norm" else value / n_steps for name, value in numbers.items()}


def _first_non_finite(grads: list[Tensor], like: Tensor) -> Tensor:
    """Return, `[2]` of float64, whether a gradient is not finite, and its position among all numbers in one row."""
    if not grads:
        return torch.zeros(2, dtype=torch.float64, device=like.device)
    non_finite = torch.isfinite(torch.cat([grad.reshape(-1) for grad in grads])).logical_not().byte()
    return torch.stack((non_finite.amax().double(), non_finite.argmax().double()))


def _name_at(sizes: list[tuple[str, int]], position: int) -> str:
    """Return the name of the parameter to which a position in the row of all numbers belongs."""
    ends = list(accumulate(size for _, size in sizes))
    return sizes[bisect_right(ends, position)][0]
