"""The `torch.library` operators of the fused backends, for autograd and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from srwm_rl.ops.checks import has_memory

CHUNK = 16  # steps between checkpoints, in csrc/srwm_cpu.c too

# The differentiable inputs, by recurrence. The first is [T, B, H, D], the last the carried state.
SRWM_INPUTS = "Tensor x, Tensor weight, Tensor? retention, Tensor? shift"
DELTA_INPUTS = "Tensor key, Tensor value, Tensor query, Tensor rate, Tensor? weight"
Inputs = Sequence[Tensor | None]
Outputs = tuple[Tensor, Tensor, Tensor]


def srwm_widths(x: Tensor, weight: Tensor, *_: Tensor | None) -> tuple[int, int]:
    """Return E and E+2D+4, the columns of an SRWM's output and of its weight."""
    return weight.shape[-1] - 2 * x.shape[-1] - 4, weight.shape[-1]


def delta_widths(key: Tensor, *_: Tensor | None) -> tuple[int, int]:
    """Return D twice, the columns of the delta rule's output and of its fast weight."""
    return key.shape[-1], key.shape[-1]


def new_outputs(x: Tensor, width: int, columns: int, keep: bool) -> Outputs:
    """Return memory for `y` `[T, B, H, E]`, the final state `[B, H, D, C]` and, with `keep`, the checkpoints."""
    n_steps, batch, heads, size = x.shape
    final = x.new_empty(batch, heads, size, columns)
    checkpoints = x.new_empty((n_steps - 1) // CHUNK if keep else 0, *final.shape)
    return x.new_empty(n_steps, batch, heads, width), final, checkpoints


def new_gradients(inputs: Inputs) -> list[Tensor]:
    """Return memory for the inputs' gradients, empty for those that are None."""
    x = inputs[0]
    assert x is not None
    return [x.new_empty(0 if tensor is None else tensor.shape) for tensor in inputs]


def register_scan(
    name: str,
    inputs: str,
    widths: Callable[..., tuple[int, int]],
    forward: Callable[..., Outputs],
    backward: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register `srwm_rl::<name>` and its backward pass; return a function `(*inputs, starts, bound) -> (y, final)`.

    `forward(*inputs, starts, bound, keep)` returns `y` `[T, B, H, E]`, the final state `[B, H, D, C]` and the
    checkpoints `[(T-1) // CHUNK, B, H, D, C]` (none unless `keep`), where `E, C = widths(*inputs)`.
    `backward(*inputs, starts, bound, checkpoints, grad_y, grad_final)` returns the gradients of `inputs`, empty for
    those that are None. `starts` is uint8. There are no second derivatives: the reference has them.
    """
    n = inputs.count(",") + 1
    arguments, grads = f"{inputs}, Tensor? starts, float? bound", ", ".join(["Tensor"] * n)
    schema = f"({arguments}, bool keep) -> (Tensor, Tensor, Tensor)"
    operator = torch.library.custom_op(f"srwm_rl::{name}", forward, mutates_args=(), schema=schema)
    schema = f"({arguments}, Tensor checkpoints, Tensor? grad_y, Tensor? grad_final) -> ({grads})"
    reverse = torch.library.custom_op(f"srwm_rl::{name}_backward", backward, mutates_args=(), schema=schema)

    def differentiate(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        *saved, checkpoints = ctx.saved_tensors  # the inputs, then the starts
        if checkpoints.shape[0] < (saved[0].shape[0] - 1) // CHUNK:
            raise RuntimeError(f"srwm_rl::{name} was called with keep=False, so it has no backward pass")
        gradients = reverse(*saved, ctx.bound, checkpoints, grad_y, grad_final)
        return *(None if x is None else grad for x, grad in zip(saved[:-1], gradients, strict=True)), None, None, None

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        *tensors, ctx.bound, _ = inputs
        ctx.save_for_backward(*tensors, output[2])

    operator.register_fake(lambda *arguments: new_outputs(arguments[0], *widths(*arguments[:n]), arguments[-1]))
    reverse.register_fake(lambda *arguments: tuple(new_gradients(arguments[:n])))
    operator.register_autograd(differentiate, setup_context=save_inputs)

    def scan(*arguments: Any) -> tuple[Tensor, Tensor]:
        grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:n])
        # When acting, torch's dispatcher would take as long as the step.
        direct = not grad and has_memory(arguments[0])
        y, final, _ = (forward if direct else operator)(*arguments, grad)
        return y, final

    return scan
