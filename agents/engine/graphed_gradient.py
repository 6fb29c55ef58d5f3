"""A group's gradient by captured graphs: forward pass, loss and backward pass as one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from srwm_rl.agents.engine.cuda_graphs import capture as capture_graph
from srwm_rl.agents.engine.cuda_graphs import copy_into, first_line, room_for
from srwm_rl.nn.module_fingerprint import ModuleFingerprint

Work = Callable[[], Tensor]
Grads = list[Tensor | None]
SHAPES = 4  # graphs held at once: groups of sequences differ in size by one, and hold all of a minibatch or a part
CAPTURES = 12  # in all: settings that change at every update would be captured at every update
TOLERANCE = 0.02  # of the gradient's norm; bfloat16 keeps 8 bits, and a graph may add up in another order
logger = logging.getLogger(__name__)


class _Captured(NamedTuple):
    """A graph and the tensors that it reads."""

    inputs: Any
    replay: Work


class GraphedGradient:
    """Call it like `gradient`: the same sums and the same gradient, by a graph captured at the first call for a shape.

    The graphs add to the parameters' `.grad` where these are, so that several groups add up; call `zero` before the
    first. Weights are read where they are, so that the optimizer may change them between two calls. The first call
    for a shape gives the results of `gradient` itself, with which the graph's are compared. One that cannot be
    captured, or that gives something else, is given up with a line in the log, and all goes on without graphs.

    Args:
        gradient: adds the gradient of what it is given to the parameters' `.grad` and returns the loss's terms `[n]`,
            detached. It may depend on the weights, on what it is given and on `settings`, and nothing else.
        parameters: those that may get a gradient.
        capture: makes a graph; another one is for tests.
        quiet: held while capturing, to keep other threads from drawing random numbers on the device.
        network: whose parameters they are; see `fit`.

    Attributes:
        disabled: whether there are no graphs any more.
    """

    def __init__(
        self,
        gradient: Callable[[Any], Tensor],
        parameters: Sequence[Tensor],
        capture: Callable[[Work], Work] | None = None,
        quiet: AbstractContextManager[Any] | None = None,
        network: nn.Module | None = None,
    ) -> None:
        self.gradient, self.parameters = gradient, list(parameters)
        self.quiet: AbstractContextManager[Any] = quiet or nullcontext()
        self._fingerprint = None if network is None else ModuleFingerprint(network)
        self._capture = capture
        self._kept: Grads = [None] * len(self.parameters)  # the gradients that the graphs add to
        self._graphs: dict[Hashable, _Captured] = {}
        self._settings: Hashable = None
        self._captures = 0
        self.disabled = False

    def fit(self, parameters: Sequence[Tensor]) -> bool:
        """Say whether these are the parameters that get the gradient, and the network is still what it was."""
        same = len(parameters) == len(self.parameters) and all(
            one is other for one, other in zip(parameters, self.parameters, strict=True)
        )
        return same and (self._fingerprint is None or self._fingerprint.matches())

    def zero(self) -> None:
        """Put the gradients in their places, also where something else took them away, and let them be zero."""
        for parameter, kept in zip(self.parameters, self._kept, strict=True):
            parameter.grad = kept
        there = [kept for kept in self._kept if kept is not None]
        if there:
            torch._foreach_zero_(there)

    def __call__(self, given: Any, settings: Hashable = ()) -> Tensor:
        """Add the gradient of a group.

        Args:
            given: tensors, floats and None in (named) tuples and dicts.
            settings: what else the gradient depends on; graphs made with others are let go.

        Returns:
            The loss's terms `[n]`, in memory of their own.
        """
        if self.disabled:
            return self.gradient(given)
        if settings != self._settings:
            self._graphs, self._settings = {}, settings
        key = _shapes(given)
        graph = self._graphs.get(key)
        if graph is None:
            return self.gradient(given) if len(self._graphs) == SHAPES else self._first(key, given)
        copy_into(graph.inputs, given)
        return graph.replay().clone()

    def _first(self, key: Hashable, given: Any) -> Tensor:
        """Do it without a graph, and make one."""
        before = [None if each is None else each.clone() for each in self._taken()]
        terms = self.gradient(given)
        found = self._taken()
        norm = _norm(found)
        if torch.isfinite(norm) and norm > 0:  # else there is nothing to compare a graph's gradient with
            with self.quiet:
                self._try_to_capture(key, given, found, terms)
        self._put([_sum(one, other) for one, other in zip(before, found, strict=True)])
        return terms

    def _try_to_capture(self, key: Hashable, given: Any, expected: Grads, terms: Tensor) -> None:
        inputs = room_for(given, self.parameters[0].device)
        copy_into(inputs, given)
        for i, (parameter, each) in enumerate(zip(self.parameters, expected, strict=True)):
            # What gets no gradient keeps none: an optimizer treats that otherwise than a gradient of zero.
            if each is not None and self._kept[i] is None:
                self._kept[i] = torch.zeros_like(parameter)
        self.zero()
        wrong = ""
        try:
            replay = self._make(lambda: self.gradient(inputs))
            self.zero()
            wrong = self._difference(replay(), terms, expected)
        except RuntimeError as error:
            wrong = first_line(error)
        self._captures += 1
        if not wrong and self._captures > CAPTURES:
            wrong = "its settings change too often"
        if wrong:
            self.disabled = True
            self._graphs, self._kept = {}, [None] * len(self.parameters)
            logger.warning("learning goes on without CUDA graphs: %s", wrong)
            return
        self._graphs[key] = _Captured(inputs, replay)

    def _make(self, work: Work) -> Work:
        if self._capture is None:  # its graphs are replayed one at a time: their activations may share memory
            stream, pool = torch.cuda.Stream(self.parameters[0].device), torch.cuda.graph_pool_handle()
            self._capture = partial(capture_graph, stream=stream, pool=pool, draws=False)
        return self._capture(work)

    def _difference(self, found: Tensor, terms: Tensor, expected: Grads) -> str:
        """Say in what a graph's first results differ from those without it."""
        if not torch.allclose(found, terms, rtol=TOLERANCE, atol=TOLERANCE * terms.abs().max().item(), equal_nan=True):
            return "the loss differs from the one without it"
        apart: Grads = []
        for parameter, each in zip(self.parameters, expected, strict=True):
            apart.append(parameter.grad if each is None or parameter.grad is None else parameter.grad - each)
        return "" if _norm(apart) <= TOLERANCE * _norm(expected) else "the gradient differs from the one without it"

    def _taken(self) -> Grads:
        """Take the gradients away from the parameters."""
        taken = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return taken

    def _put(self, grads: Grads) -> None:
        """Put gradients in their places; what is kept for the graphs stays where it is."""
        self.zero()
        for parameter, kept, grad in zip(self.parameters, self._kept, grads, strict=True):
            if kept is None:
                parameter.grad = grad
            elif grad is not None:
                kept.copy_(grad)


def _shapes(given: Any) -> Hashable:
    if isinstance(given, dict):
        return tuple((key, _shapes(each)) for key, each in given.items())
    if isinstance(given, tuple):
        return tuple(_shapes(each) for each in given)
    if isinstance(given, Tensor):
        return tuple(given.shape), given.dtype
    return type(given).__name__


def _norm(grads: Grads) -> Tensor:
    return torch.nn.utils.get_total_norm([each for each in grads if each is not None])


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other
