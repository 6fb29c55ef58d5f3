"""The gradient of PPO's loss on the CPU, forward and back through a policy's programs and memories, without autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeGuard

import torch
from torch import Tensor

from srwm_rl.native.lowering import LoweredPolicy
from srwm_rl.nn.layers import MemoryLayer, SRWMLayer
from srwm_rl.nn.policy import Obs, SRWMPolicy
from srwm_rl.ops import cpu
from srwm_rl.ops.checks import as_uint8
from srwm_rl.ops.program import PPOLossParams

BackwardFn = Callable[[Tensor], Tensor]


class PPOGradient:
    """The way through a policy and back to the gradient of PPO's loss.

    Args:
        policy: whose weights get the gradient.
        programs: how it is written down; with a `surrogate`.
        bptt: cut the gradient through the core's state every so many steps; None: never.

    Attributes:
        shared: whether a weight is used in several places, whose gradients nobody here would add up.
    """

    def __init__(self, policy: SRWMPolicy, programs: LoweredPolicy, bptt: int | None) -> None:
        assert programs.surrogate is not None
        self.bptt, self._inputs = bptt, programs.inputs
        self._parts = [*programs.parts[:-1], programs.surrogate]
        self._layers: Sequence[MemoryLayer] = policy.core.layers  # type: ignore[assignment]
        plain = [each for each in self._layers if bptt is None and _is_plain(each)]
        self._weights = [each for part in self._parts for each in part.learnt] + [each.weight for each in plain]
        self._plain = {each: number for number, each in enumerate(plain, len(self._weights) - len(plain))}
        self._size = sum(each.numel() for each in self._weights)
        self.shared = len({id(each) for each in self._weights}) < len(self._weights)

    def add_gradient(
        self, obs: Obs, core_state: Tensor, episode_starts: Tensor, given: Sequence[Tensor], surrogate: PPOLossParams
    ) -> Tensor:
        """Add the gradient of PPO's loss over an unroll to the weights'.

        Where they had none, theirs are the parts of one tensor: a norm of them all is then one operation.

        Args:
            obs, core_state, episode_starts: see `SRWMPolicy.evaluate_sequence`.
            given: actions, then former log-probabilities, advantages, returns and values, each `[T * B, 1]`, float32.
            surrogate: the loss's settings.

        Returns:
            The loss's terms `[5]`, summed over steps.
        """
        n_layers, batch, size = len(self._layers), episode_starts.shape[1], self._layers[0].state_size
        assert core_state.shape == (n_layers, batch, size), "not the core's state"
        assert (core_state.dtype, core_state.device.type) == (torch.float32, "cpu"), "C reads float32 on the CPU"
        with torch.no_grad():
            # Somebody may keep the gradients of the last update: these get memory of their own.
            grads = torch._utils._unflatten_dense_tensors(torch.empty(self._size), self._weights)
            terms = self._go(obs, core_state, episode_starts, given, surrogate, grads)
        for each, grad in zip(self._weights, grads, strict=True):
            if each.requires_grad:
                each.grad = grad if each.grad is None else each.grad + grad
        return terms

    def _go(
        self,
        obs: Obs,
        core_state: Tensor,
        episode_starts: Tensor,
        given: Sequence[Tensor],
        surrogate: PPOLossParams,
        grads_of_weights: Sequence[Tensor],
    ) -> Tensor:
        """Go there and back; leave the gradients of `_weights` there.

        Autograd adds those of the networks for images, and of other memories.
        """
        parts, shape = self._parts, episode_starts.shape
        rest = iter(grads_of_weights)
        grad_buffers = [list(islice(rest, len(part.learnt))) for part in parts]
        with torch.enable_grad():
            seen = self._inputs.of(obs, shape.numel())
        inputs, before, backwards = seen, [], []
        for layer, carried, part in zip(self._layers, core_state.unbind(0), parts, strict=False):
            stream, x = part.forward(inputs)
            heads = x.view(*shape, layer.n_heads, layer.head_size)
            if layer in self._plain:
                grad_weight = grads_of_weights[self._plain[layer]]
                y, backward = _scanned(layer, heads, carried, episode_starts, grad_weight)
            else:
                y, backward = _recurred(layer, heads, carried, episode_starts, self.bptt)
            before.append(inputs)
            backwards.append(backward)
            inputs = [stream, y.reshape(stream.shape)]
        grads, terms = parts[-1].loss_and_grad([*inputs, *given], surrogate, grad_buffers[-1])
        for part, grad_buffer, inputs, backward in zip(
            parts[-2::-1], grad_buffers[-2::-1], before[::-1], backwards[::-1], strict=True
        ):
            grad_stream, grad_y = grads[:2]
            assert grad_stream is not None
            assert grad_y is not None
            grad_x = backward(grad_y.view(heads.shape)).reshape(grad_stream.shape)
            grads = part.backward(inputs, (grad_stream, grad_x), part.wanted, grad_buffer)
        for features, grad in zip(seen, grads, strict=True):
            if features.requires_grad:  # of images, whose network torch runs
                features.backward(grad)
        return terms


def _scanned(
    layer: SRWMLayer, heads: Tensor, state: Tensor, episode_starts: Tensor, grad_weight: Tensor
) -> tuple[Tensor, BackwardFn]:
    """Run the memory of a layer that `_is_plain` over an unroll.

    Returns:
        What it gave `[T, B, H, D]`, and what makes of that one's gradient the gradient of `heads`, and leaves its
        weight's in `grad_weight`.
    """
    shift, starts, bound = state.unflatten(-1, layer.shift_shape), as_uint8(episode_starts), layer.shift_bound
    y, _, checkpoints = cpu.forward(heads, layer.weight, None, shift, starts, bound, keep=True)

    def back(grad_y: Tensor) -> Tensor:
        grad_x, found, *_ = cpu.backward(
            heads, layer.weight, None, shift, starts, bound, checkpoints, grad_y, grad_final=None
        )
        grad_weight.copy_(found)
        return grad_x

    return y, back


def _recurred(
    layer: MemoryLayer, heads: Tensor, state: Tensor, episode_starts: Tensor, bptt: int | None
) -> tuple[Tensor, BackwardFn]:
    """Run any layer's memory over an unroll, and autograd on the way back, which adds to its weights' gradients.

    Returns:
        See `_scanned`.
    """
    with torch.enable_grad():
        leaf = heads.detach().requires_grad_()
        y, _ = recur(layer, leaf, state, episode_starts, bptt)

    def back(grad_y: Tensor) -> Tensor:
        if y.requires_grad:
            y.backward(grad_y)
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    return y.detach(), back


def _is_plain(layer: MemoryLayer) -> TypeGuard[SRWMLayer]:
    """Say whether a layer's memory is the SRWM's recurrence and nothing besides."""
    if type(layer) is not SRWMLayer or getattr(layer.recur, "__func__", None) is not SRWMLayer.recur:
        return False
    return layer.gate is None and layer.frozen_weight is None


def recur(
    layer: MemoryLayer, heads: Tensor, state: Tensor, episode_starts: Tensor, bptt: int | None
) -> tuple[Tensor, Tensor]:
    """Run a layer's memory over an unroll, cutting its gradient every `bptt` steps."""
    if bptt is None or bptt >= len(heads):
        return layer.recur(heads, state, episode_starts)
    outputs = []
    for part, starts in zip(heads.split(bptt), episode_starts.split(bptt), strict=True):
        y, state = layer.recur(part, state.detach(), starts)
        outputs.append(y)
    return torch.cat(outputs), state
