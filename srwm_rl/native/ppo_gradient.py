"""The gradient of PPO's loss on the CPU without autograd, through a policy's programs and memories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeGuard

import torch
from torch import Tensor

from srwm_rl.native.lowering import LoweredPolicy
from srwm_rl.nn.cores.stack import StackCore
from srwm_rl.nn.cores.unroll import run_in_segments
from srwm_rl.nn.layers import MemoryLayer, SRWMLayer
from srwm_rl.nn.policy import Obs, SRWMPolicy
from srwm_rl.nn.short_conv import ShortConv
from srwm_rl.ops import cpu
from srwm_rl.ops.checks import as_uint8, check_float32
from srwm_rl.ops.program import PPOLossParams

BackwardFn = Callable[[Tensor], Tensor]


class PPOGradient:
    """The forward and backward pass of PPO's loss through a policy's programs and memories, in C.

    The lowered policy must have a `ppo_loss`. The gradient through the core's state is cut every `bptt` steps.

    Attributes:
        shared: whether a weight is used in several places: their gradients would not be summed here.
    """

    def __init__(self, policy: SRWMPolicy, lowered: LoweredPolicy, bptt: int | None) -> None:
        assert lowered.ppo_loss is not None
        self.bptt, self._inputs = bptt, lowered.inputs
        self._programs = [*lowered.programs[:-1], lowered.ppo_loss]
        self._core: StackCore = policy.core  # type: ignore[assignment]
        plain = [layer for layer in self._core.recurrences() if bptt is None and _is_plain(layer)]
        self._weights = [weight for program in self._programs for weight in program.trainable]
        self._plain = {layer: index for index, layer in enumerate(plain, len(self._weights))}
        self._weights += [layer.weight for layer in plain]
        self._size = sum(weight.numel() for weight in self._weights)
        self.shared = len({id(weight) for weight in self._weights}) < len(self._weights)

    def add_gradient(
        self, obs: Obs, core_state: Tensor, episode_starts: Tensor, inputs: Sequence[Tensor], params: PPOLossParams
    ) -> Tensor:
        """Add the gradient of PPO's loss over an unroll to the weights' `.grad`.

        Weights without `.grad` get views of one tensor: its norm is then one operation. `inputs` are the actions, then
        old log-probabilities, advantages, returns and old values, `[T * B, 1]`, float32. Returns the loss's terms
        `[5]`, summed over steps.
        """
        core, batch = self._core, episode_starts.shape[1]
        check_float32("core_state", core_state, (core.state_layers, batch, core.state_size))
        with torch.no_grad():
            # New memory each time: a caller may keep the gradients of the last update.
            grads = torch._utils._unflatten_dense_tensors(core_state.new_empty(self._size), self._weights)
            sums = self._run(obs, core_state, episode_starts, inputs, params, grads)
        for weight, grad in zip(self._weights, grads, strict=True):
            if weight.requires_grad:
                weight.grad = grad if weight.grad is None else weight.grad + grad
        return sums

    def _run(
        self,
        obs: Obs,
        core_state: Tensor,
        episode_starts: Tensor,
        inputs: Sequence[Tensor],
        params: PPOLossParams,
        weight_grads: Sequence[Tensor],
    ) -> Tensor:
        """Run forward and backward; write the gradients of `_weights` into `weight_grads`.

        Autograd adds those of the image encoders and of memories that are not plain.
        """
        programs, shape = self._programs, episode_starts.shape
        remaining = iter(weight_grads)
        grad_buffers = [list(islice(remaining, len(program.trainable))) for program in programs]
        with torch.enable_grad():
            features = self._inputs.of(obs, shape.numel())
        values, program_inputs, memory_backward = features, [], []
        recurrences, states = self._core.recurrences(), self._core.split_state(core_state)
        for module, state, program in zip(recurrences, states, programs, strict=False):
            *stream, x = program.forward(values)
            steps = x.view(*shape, *module.input_shape)
            if _is_plain(module) and module in self._plain:
                weight_grad = weight_grads[self._plain[module]]
                y, backward = _scan(module, steps, state, episode_starts, weight_grad)
            else:
                y, backward = _recur_by_autograd(module, steps, state, episode_starts, self.bptt)
            program_inputs.append(values)
            memory_backward.append(backward)
            values = [*stream, y.reshape(x.shape)]
        grads, sums = programs[-1].loss_and_grad([*values, *inputs], params, grad_buffers[-1])
        for program, buffers, values, backward in zip(
            programs[-2::-1], grad_buffers[-2::-1], program_inputs[::-1], memory_backward[::-1], strict=True
        ):
            *grad_stream, grad_y = (grad for grad in grads if grad is not None)
            grad_x = backward(grad_y).reshape(grad_y.shape)
            grads = program.backward(values, (*grad_stream, grad_x), program.input_needs_grad, buffers)
        for feature, grad in zip(features, grads, strict=True):
            if feature.requires_grad:  # from an image encoder, which torch runs
                feature.backward(grad)
        return sums


def _scan(
    layer: SRWMLayer, heads: Tensor, state: Tensor, episode_starts: Tensor, weight_grad: Tensor
) -> tuple[Tensor, BackwardFn]:
    """Run the memory of a plain layer over an unroll; return its output `[T, B, H, D]` and a function.

    The function maps that output's gradient to the gradient of `heads` and writes the weight's into `weight_grad`.
    """
    shift, starts, bound = state.unflatten(-1, layer.shift_shape), as_uint8(episode_starts), layer.shift_bound
    y, _, checkpoints = cpu.forward(heads, layer.weight, None, shift, starts, bound, True)

    def backward(grad_y: Tensor) -> Tensor:
        grad_x, grad_weight, *_ = cpu.backward(
            heads, layer.weight, None, shift, starts, bound, checkpoints, grad_y, None
        )
        weight_grad.copy_(grad_weight)
        return grad_x

    return y, backward


def _recur_by_autograd(
    module: MemoryLayer | ShortConv, steps: Tensor, state: Tensor, episode_starts: Tensor, bptt: int | None
) -> tuple[Tensor, BackwardFn]:
    """As `_scan` for any recurrence; the backward function uses autograd, which adds to its weights' `.grad`."""
    with torch.enable_grad():
        leaf = steps.detach().requires_grad_()
        y, _ = run_in_segments(module.recur, leaf, state, episode_starts, bptt)

    def backward(grad_y: Tensor) -> Tensor:
        if y.requires_grad:
            y.backward(grad_y.view_as(y))
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    return y.detach(), backward


def _is_plain(layer: MemoryLayer | ShortConv) -> TypeGuard[SRWMLayer]:
    """Return whether a recurrence is that of the SRWM without gate or frozen slices."""
    if type(layer) is not SRWMLayer or getattr(layer.recur, "__func__", None) is not SRWMLayer.recur:
        return False
    return layer.gate is None and layer.frozen_weight is None
