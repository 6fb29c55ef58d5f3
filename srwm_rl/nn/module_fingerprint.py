"""A fingerprint of a network's modules and weights, by which a compiled form detects that it is outdated."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import nn


class ModuleFingerprint:
    """The identity of a network's modules, weights, their memory and hooks at the time of construction.

    A compiled form of the network (a lowered program, a captured graph) is valid while `matches` is true. Values of
    weights may change. A weight or module that was replaced, moved, frozen, unfrozen or added, and a hook that was
    added or removed, are detected; changed attributes of modules and global module hooks are not.

    Attributes:
        weights: the network's parameters and buffers.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        registries = [reg for module in modules for reg in (module._modules, module._parameters, module._buffers)]
        self._hooks: list[dict[Any, Any]] = [
            hooks
            for m in modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._registries: list[dict[str, Any]] = [registry for registry in registries if registry]
        self._empty = [registry for registry in registries if not registry]
        self._members = self._current_members()
        self.weights = [*network.parameters(), *network.buffers()]
        self._layout = self._current_layout()
        self._n_hooks = self.n_hooks

    @property
    def n_hooks(self) -> int:
        """Current number of the modules' hooks."""
        return sum(map(len, self._hooks))

    def _current_members(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._registries))]

    def _current_layout(self) -> list[tuple[int, bool, bool]]:
        return [(weight.data_ptr(), weight.is_contiguous(), weight.requires_grad) for weight in self.weights]

    def matches(self) -> bool:
        """Return whether the network is still the same."""
        members = self._current_members()
        return (
            len(members) == len(self._members)
            and all(map(is_, members, self._members))
            and not any(self._empty)
            and self._current_layout() == self._layout
            and self.n_hooks == self._n_hooks
        )
