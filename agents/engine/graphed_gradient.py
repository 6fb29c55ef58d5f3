"""The gradient of a micro-batch as a captured CUDA graph: forward pass, loss and backward pass in one launch."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srwm_rl.agents.engine.cuda_graphs import capture as capture_graph
from srwm_rl.agents.engine.cuda_graphs import copy_into, empty_like_args, first_line
from srwm_rl.nn.module_fingerprint import ModuleFingerprint

Work = Callable[[], Tensor]
Grads = list[Tensor | None]
MAX_SHAPES = 4  # graphs held at once: micro-batches differ in size by one sequence, or are whole minibatches
MAX_CAPTURES = 12  # in all: settings that change at every update would be captured at every update
TOLERANCE = 0.02  # of the gradient's norm: bfloat16 keeps 8 bits, and a graph may sum in another order
logger = logging.getLogger(__name__)


class _Captured(NamedTuple):
    """A graph and the tensors that it reads."""

    inputs: Any
    replay: Work


class GraphedGradient:
    """`gradient` as CUDA graphs, one captured at the first call for each shape; sums and gradients are the same.

    The graphs add to the parameters' `.grad` in place, so that micro-batches accumulate; call `zero` before the first.
    Weights are read in place, so the optimizer may change them between calls. The first call for a shape returns the
    results of `gradient` itself, with which the graph's are compared. If a capture fails or differs, a warning is
    logged and all goes on without graphs.

    Args:
        gradient: adds its argument's gradient to the parameters' `.grad` and returns the loss's terms `[n]`, detached.
            It may depend on the weights, its argument and `settings`, and nothing else.
        parameters: those that may get a gradient.
        capture: captures a graph; tests replace it.
        lock: held while capturing, to keep other threads from drawing random numbers on the device.
        network: the module of the parameters; see `fits`.

    Attributes:
        disabled: whether graphs are no longer used.
    """

    def __init__(
        self,
        gradient: Callable[[Any], Tensor],
        parameters: Sequence[Tensor],
        capture: Callable[[Work], Work] | None = None,
        lock: AbstractContextManager[Any] | None = None,
        network: nn.Module | None = None,
    ) -> None:
        self.gradient, self.parameters = gradient, list(parameters)
        self.lock: AbstractContextManager[Any] = lock or nullcontext()
        self._fingerprint = None if network is None else ModuleFingerprint(network)
        self._capture = capture
        self._grads: Grads = [None] * len(self.parameters)  # the tensors that the graphs add to
        self._graphs: dict[Hashable, _Captured] = {}
        self._settings: Hashable = None
        self._n_captures = 0
        self.disabled = False

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the graphs are for these parameters, and the network is unchanged."""
        same = len(parameters) == len(self.parameters) and all(map(operator.is_, parameters, self.parameters))
        return same and (self._fingerprint is None or self._fingerprint.matches())

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
        graph = self._graphs.get(key)
        if graph is None:
            return self.gradient(args) if len(self._graphs) == MAX_SHAPES else self._first_call(key, args)
        copy_into(graph.inputs, args)
        return graph.replay().clone()

    def _first_call(self, key: Hashable, args: Any) -> Tensor:
        """Compute without a graph, then capture one and compare."""
        before = [None if grad is None else grad.clone() for grad in self._take_grads()]
        sums = self.gradient(args)
        grads = self._take_grads()
        norm = _norm(grads)
        if torch.isfinite(norm) and norm > 0:  # else there is nothing to compare with
            with self.lock:
                self._try_to_capture(key, args, grads, sums)
        self._set_grads([_add(old, new) for old, new in zip(before, grads, strict=True)])
        return sums

    def _try_to_capture(self, key: Hashable, args: Any, expected: Grads, sums: Tensor) -> None:
        inputs = empty_like_args(args, self.parameters[0].device)
        copy_into(inputs, args)
        for i, (parameter, grad) in enumerate(zip(self.parameters, expected, strict=True)):
            # A parameter without gradient keeps none: optimizers treat that otherwise than a gradient of zero.
            if grad is not None and self._grads[i] is None:
                self._grads[i] = torch.zeros_like(parameter)
        self.zero()
        problem = ""
        try:
            replay = self._make_graph(lambda: self.gradient(inputs))
            self.zero()
            problem = self._difference(replay(), sums, expected)
        except RuntimeError as error:
            problem = first_line(error)
        self._n_captures += 1
        if not problem and self._n_captures > MAX_CAPTURES:
            problem = "its settings change too often"
        if problem:
            self.disabled = True
            self._graphs, self._grads = {}, [None] * len(self.parameters)
            logger.warning("learning goes on without CUDA graphs: %s", problem)
            return
        self._graphs[key] = _Captured(inputs, replay)

    def _make_graph(self, work: Work) -> Work:
        if self._capture is None:  # one pool: graphs are replayed one at a time and may share activations' memory
            stream, pool = torch.cuda.Stream(self.parameters[0].device), torch.cuda.graph_pool_handle()
            self._capture = partial(capture_graph, stream=stream, pool=pool, draws=False)
        return self._capture(work)

    def _difference(self, sums: Tensor, expected_sums: Tensor, expected: Grads) -> str:
        """Name what differs between a graph's first results and those without it."""
        atol = TOLERANCE * expected_sums.abs().max().item()
        if not torch.allclose(sums, expected_sums, rtol=TOLERANCE, atol=atol, equal_nan=True):
            return "the loss differs from the one without it"
        differences: Grads = []
        for parameter, grad in zip(self.parameters, expected, strict=True):
            differences.append(parameter.grad if grad is None or parameter.grad is None else parameter.grad - grad)
        close = _norm(differences) <= TOLERANCE * _norm(expected)
        return "" if close else "the gradient differs from the one without it"

    def _take_grads(self) -> Grads:
        """Remove the gradients from the parameters and return them."""
        grads = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return grads

    def _set_grads(self, grads: Grads) -> None:
        """Set the parameters' gradients; the graphs' tensors are written in place."""
        self.zero()
        for parameter, kept, grad in zip(self.parameters, self._grads, grads, strict=True):
            if kept is None:
                parameter.grad = grad
            elif grad is not None:
                kept.copy_(grad)


def _shapes(args: Any) -> Hashable:
    leaves, structure = pytree.tree_flatten(args)
    shapes = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    return str(structure), tuple(shapes)


def _norm(grads: Grads) -> Tensor:
    return torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None])


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b
