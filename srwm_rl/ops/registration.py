"""The `torch.library` operators of the fused backends, for autograd and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 16  # steps between checkpoints, in csrc/srwm_cpu.c too

# The differentiable inputs, by recurrence. The first is [T, B, H, D], the last the carried state.
SRWM_INPUTS = "Tensor x, Tensor weight, Tensor? retention, Tensor? shift"
SRWM_OPTION = "float? bound"
DELTA_INPUTS = "Tensor key, Tensor value, Tensor query, Tensor rate, Tensor? weight"
Outputs = tuple[Tensor, Tensor, Tensor]


def srwm_widths(x: Tensor, weight: Tensor, *_: Tensor | None) -> tuple[int, int]:
    """Return E and E+2D+4, the columns of an SRWM's output and of its weight."""
    return weight.shape[-1] - 2 * x.shape[-1] - 4, weight.shape[-1]


def delta_widths(key: Tensor, *_: Tensor | None) -> tuple[int, int]:
    """Return D twice, the columns of the delta rule's output and of its fast weight."""
    return key.shape[-1], key.shape[-1]


def register_scan(
    name: str,
    inputs: str,
    widths: Callable[..., tuple[int, int]],
    forward: Callable[..., Outputs],
    backward: Callable[..., tuple[Tensor, ...]],
    option: str | None = None,
) -> Callable[..., Outputs]:
    """Register `srwm_rl::<name>` and its backward pass; return the operator.

    `forward(*inputs, starts, keep)` returns `y` `[T, B, H, E]`, the final state `[B, H, D, C]` and the checkpoints
    `[(T-1) // CHUNK, B, H, D, C]` (none unless `keep`), where `E, C = widths(*inputs)`. `backward(*inputs, starts,
    checkpoints, grad_y, grad_final)` returns the gradients of `inputs`, empty for those that are None. `option`: an
    argument of both after `starts`, such as "float? bound". There are no second derivatives: the reference has them.
    """
    tensors = inputs.count(",") + 1
    grads = ", ".join(["Tensor"] * tensors)
    arguments = f"{inputs}, Tensor? starts" + (f", {option}" if option else "")
    schema = f"({arguments}, bool keep) -> (Tensor, Tensor, Tensor)"
    operator = torch.library.custom_op(f"srwm_rl::{name}", forward, mutates_args=(), schema=schema)
    schema = f"({arguments}, Tensor checkpoints, Tensor? grad_y, Tensor? grad_final) -> ({grads})"
    reverse = torch.library.custom_op(f"srwm_rl::{name}_backward", backward, mutates_args=(), schema=schema)

    def fake_forward(first: Tensor, *others: Any) -> Outputs:
        n_steps, batch, heads, size = first.shape
        width, columns = widths(first, *others[: tensors - 1])
        final = first.new_empty(batch, heads, size, columns)
        return (
            first.new_empty(n_steps, batch, heads, width),
            final,
            first.new_empty((n_steps - 1) // CHUNK if others[-1] else 0, *final.shape),
        )

    def fake_backward(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        first = arguments[0]
        assert first is not None
        return tuple(first.new_empty(0 if x is None else x.shape) for x in arguments[:tensors])

    def differentiate(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        *saved, checkpoints = ctx.saved_tensors  # the inputs, then the starts
        if checkpoints.shape[0] < (saved[0].shape[0] - 1) // CHUNK:
            raise RuntimeError(f"srwm_rl::{name} was called with keep=False, so it has no backward pass")
        gradients = reverse(*saved, *ctx.options, checkpoints, grad_y, grad_final)
        grads = (None if x is None else grad for x, grad in zip(saved[:-1], gradients, strict=True))
        return *grads, *[None] * (2 + len(ctx.options))

    operator.register_fake(fake_forward)
    reverse.register_fake(fake_backward)

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: tensors + 1], output[2])
        ctx.options = inputs[tensors + 1 : -1]  # all but `keep`

    operator.register_autograd(differentiate, setup_context=save_inputs)
    return operator
