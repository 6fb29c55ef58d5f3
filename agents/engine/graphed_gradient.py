"""The gradient of a micro-batch as a captured CUDA graph: forward pass, loss and backward pass in one launch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srwm_rl.agents.engine.cuda_graphs import CheckedGraphs, copy_into, empty_like_args
from srwm_rl.nn.module_fingerprint import ModuleFingerprint

Grads = list[Tensor | None]
MAX_SHAPES = 4  # graphs held at once: micro-batches differ in size by one sequence, or are whole minibatches
MAX_CAPTURES = 12  # in all: settings that change at every update would be captured at every update
TOLERANCE = 0.02  # of the gradient's norm: bfloat16 keeps 8 bits, and a graph may sum in another order


class GraphedGradient(CheckedGraphs):
    """`gradient` as CUDA graphs, one captured at the first call for each shape; sums and gradients are the same.

    The graphs add to the parameters' `.grad` in place, so that micro-batches accumulate; call `zero` before the first.
    Weights are read in place, so the optimizer may change them between calls. The first call for a shape returns the
    results of `gradient` itself, with which the graph's are compared.

    Args:
        gradient: adds its argument's gradient to the parameters' `.grad` and returns the loss's terms `[n]`, detached.
            It may depend on the weights, its argument and `settings`, and nothing else.
        parameters: those that may get a gradient.
        network: the module of the parameters; see `fits`.
        lock: held while capturing, to keep other threads from drawing random numbers on the device.
    """

    what = "learning"
    draws = False

    def __init__(
        self,
        gradient: Callable[[Any], Tensor],
        parameters: Sequence[Tensor],
        network: nn.Module,
        lock: AbstractContextManager[Any],
    ) -> None:
        super().__init__()
        self.gradient, self.parameters, self.lock = gradient, list(parameters), lock
        self._fingerprint = ModuleFingerprint(network)
        self._grads: Grads = [None] * len(self.parameters)  # the tensors that the graphs add to
        self._graphs: dict[Hashable, tuple[Any, Callable[[], Tensor]]] = {}  # what each reads, and its launch
        self._settings: Hashable = None
        self._n_captures = 0

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the graphs are for these parameters, and the network is unchanged."""
        same = len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters))
        return same and self._fingerprint.matches()

    def zero(self) -> None:
        """Set the parameters' `.grad` to the graphs' tensors, and these to zero."""
        for parameter, grad in zip(self.parameters, self._grads, strict=True):
            parameter.grad = grad
        grads = [grad for grad in self._grads if grad is not None]
        if grads:
            torch._foreach_zero_(grads)

    def __call__(self, args: Any, settings: Hashable = ()) -> Tensor:
        """Add the gradient of a micro-batch.

        Args:
            args: tensors, floats and None in (named) tuples and dicts.
            settings: what else the gradient depends on; graphs captured with others are dropped.

        Returns:
            The loss's terms `[n]`, in memory of their own.
        """
        if self.disabled:
            return self.gradient(args)
        if settings != self._settings:
            self._graphs, self._settings = {}, settings
        key = _shapes(args)
        if key not in self._graphs:
            return self.gradient(args) if len(self._graphs) == MAX_SHAPES else self._first_call(key, args)
        inputs, replay = self._graphs[key]
        copy_into(inputs, args)
        return replay().clone()

    def _first_call(self, key: Hashable, args: Any) -> Tensor:
        """Compute without a graph, then capture one and compare."""
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        sums = self.gradient(args)
        grads = [parameter.grad for parameter in self.parameters]
        norm = _norm(grads)
        if torch.isfinite(norm) and norm > 0:  # else there is nothing to compare with
            for i, grad in enumerate(grads):
                # A parameter without gradient keeps none: optimizers treat that otherwise than a gradient of zero.
                if grad is not None and self._grads[i] is None:
                    self._grads[i] = torch.zeros_like(self.parameters[i])
            self.zero()
            self._n_captures += 1
            inputs = empty_like_args(args, norm.device)
            copy_into(inputs, args)
            with self.lock:
                replay = self._try_to_capture(
                    partial(self.gradient, inputs), norm.device, partial(self._difference, sums, grads)
                )
            if replay is None:
                self._graphs, self._grads = {}, [None] * len(self.parameters)
            else:
                self._graphs[key] = inputs, replay
        self.zero()
        for parameter, *parts in zip(self.parameters, before, grads, strict=True):
            for part in parts:
                if part is not None:
                    parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
        return sums

    def _difference(self, expected_sums: Tensor, expected: Grads, replay: Callable[[], Tensor]) -> str:
        """Name what differs between a graph's first results and those without it."""
        self.zero()
        sums, atol = replay(), TOLERANCE * expected_sums.abs().max().item()
        if not torch.allclose(sums, expected_sums, rtol=TOLERANCE, atol=atol, equal_nan=True):
            return "the loss differs from the one without it"
        differences: Grads = []
        for parameter, grad in zip(self.parameters, expected, strict=True):
            differences.append(parameter.grad if grad is None or parameter.grad is None else parameter.grad - grad)
        close = _norm(differences) <= TOLERANCE * _norm(expected)
        if not close:  # also NaN
            return "the gradient differs from the one without it"
        return "its settings change too often" if self._n_captures > MAX_CAPTURES else ""


def _shapes(args: Any) -> Hashable:
    leaves, structure = pytree.tree_flatten(args)
    shapes = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    return str(structure), tuple(shapes)


def _norm(grads: Grads) -> Tensor:
    return torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None])
