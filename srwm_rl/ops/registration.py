"""What the fused backends share: their `torch.library` operators, so that autograd and torch.compile know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 16  # steps between checkpoints, in csrc/srwm_cpu.c too

_FORWARD = "(Tensor x, Tensor weight, Tensor? shift, Tensor? starts, bool keep) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    "(Tensor x, Tensor weight, Tensor? shift, Tensor? starts, Tensor checkpoints, Tensor? grad_y, Tensor? grad_final)"
    " -> (Tensor, Tensor, Tensor)"
)
Scan = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None", bool], tuple[Tensor, Tensor, Tensor]]


def register_scan(
    name: str, forward: Callable[..., tuple[Tensor, Tensor, Tensor]], backward: Callable[..., tuple[Tensor, ...]]
) -> Scan:
    """Register `srwm_rl::scan_<name>` and its backward pass; return the operator.

    `forward(x, weight, shift, starts, keep)` gives `y`, the final shift and the checkpoints `[(T-1) // CHUNK, B, H,
    D, 3D+4]` (none unless `keep`); `backward(x, weight, shift, starts, checkpoints, grad_y, grad_final)` the
    gradients of the first three. Gradients of gradients are not there: use the reference for them.
    """
    operator = torch.library.custom_op(f"srwm_rl::scan_{name}", forward, mutates_args=(), schema=_FORWARD)
    reverse = torch.library.custom_op(f"srwm_rl::scan_{name}_backward", backward, mutates_args=(), schema=_BACKWARD)
    operator.register_fake(_fake_forward)
    reverse.register_fake(_fake_backward)

    def pull_back(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, shift, starts, checkpoints = ctx.saved_tensors
        if checkpoints.shape[0] < (x.shape[0] - 1) // CHUNK:
            raise RuntimeError(f"srwm_rl::scan_{name} was called with keep=False, so it has no backward pass")
        grad_x, grad_weight, grad_shift = reverse(x, weight, shift, starts, checkpoints, grad_y, grad_final)
        return grad_x, grad_weight, None if shift is None else grad_shift, None, None

    operator.register_autograd(pull_back, setup_context=_remember)
    return operator


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, shift, starts, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, shift, starts, output[2])


def _fake_forward(
    x: Tensor, weight: Tensor, shift: Tensor | None, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n_steps, batch, _, _ = x.shape
    final = x.new_empty(batch, *weight.shape)
    return x.new_empty(x.shape), final, x.new_empty((n_steps - 1) // CHUNK if keep else 0, *final.shape)


def _fake_backward(x: Tensor, weight: Tensor, shift: Tensor | None, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grad_shift = x.new_empty(0) if shift is None else x.new_empty(shift.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_shift
