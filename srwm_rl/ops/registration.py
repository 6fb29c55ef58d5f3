"""What the fused backends share: their `torch.library` operators, so that autograd and torch.compile know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 16  # steps between checkpoints, in csrc/srwm_cpu.c too

# What gradients flow to, by recurrence. The first is [T, B, H, D], the last the carried state, which may be None.
SRWM_INPUTS = "Tensor x, Tensor weight, Tensor? shift"
DELTA_INPUTS = "Tensor key, Tensor value, Tensor query, Tensor rate, Tensor? weight"
Outputs = tuple[Tensor, Tensor, Tensor]


def register_scan(
    name: str,
    inputs: str,
    columns: Callable[[int], int],
    forward: Callable[..., Outputs],
    backward: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., Outputs]:
    """Register `srwm_rl::<name>` and its backward pass; return the operator.

    `forward(*inputs, starts, keep)` gives `y` in the first input's shape, the final state `[B, H, D, columns(D)]` and
    the checkpoints `[(T-1) // CHUNK, B, H, D, columns(D)]` (none unless `keep`). `backward(*inputs, starts,
    checkpoints, grad_y, grad_final)` gives the gradients of `inputs`, empty for a state that was None. Gradients of
    gradients are not there: use the reference for them.
    """
    tensors = inputs.count(",") + 1
    grads = ", ".join(["Tensor"] * tensors)
    schema = f"({inputs}, Tensor? starts, bool keep) -> (Tensor, Tensor, Tensor)"
    operator = torch.library.custom_op(f"srwm_rl::{name}", forward, mutates_args=(), schema=schema)
    schema = f"({inputs}, Tensor? starts, Tensor checkpoints, Tensor? grad_y, Tensor? grad_final) -> ({grads})"
    reverse = torch.library.custom_op(f"srwm_rl::{name}_backward", backward, mutates_args=(), schema=schema)

    def fake_forward(first: Tensor, *rest: Any) -> Outputs:
        n_steps, batch, heads, size = first.shape
        final = first.new_empty(batch, heads, size, columns(size))
        return (
            first.new_empty(first.shape),
            final,
            first.new_empty((n_steps - 1) // CHUNK if rest[-1] else 0, *final.shape),
        )

    def fake_backward(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        first = arguments[0]
        assert first is not None
        return tuple(first.new_empty(0 if each is None else each.shape) for each in arguments[:tensors])

    def pull_back(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        first, state, checkpoints = ctx.saved_tensors[0], ctx.saved_tensors[tensors - 1], ctx.saved_tensors[-1]
        if checkpoints.shape[0] < (first.shape[0] - 1) // CHUNK:
            raise RuntimeError(f"srwm_rl::{name} was called with keep=False, so it has no backward pass")
        found = reverse(*ctx.saved_tensors, grad_y, grad_final)
        return *found[:-1], None if state is None else found[-1], None, None

    operator.register_fake(fake_forward)
    reverse.register_fake(fake_backward)
    operator.register_autograd(pull_back, setup_context=_remember)
    return operator


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1], output[2])  # all but `keep`
