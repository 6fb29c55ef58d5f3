"""What a network's compiled form was made from, to see whether that is still so."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn


class ModuleFingerprint:
    """The modules of a network, their weights and where these lie, as they are now.

    Whoever keeps a network in another form (operations written down, a captured graph) asks `matches` before using
    it. What is done to the numbers in the weights is no change; a weight or module that was replaced or moved, frozen
    or unfrozen, a module that was added, and a hook that was added or taken away, are. Settings that a module keeps as
    attributes are not seen, nor are hooks of all modules there are.

    Args:
        network: whose structure it is.

    Attributes:
        weights: its parameters and buffers.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = list(network.modules())
        owners = [owned for each in modules for owned in (each._modules, each._parameters, each._buffers)]
        self._owned = [(owner.get, name) for owner in owners for name in owner]
        self._kept = [each for owner in owners for each in owner.values()]
        self.weights = [each for each in (*network.parameters(), *network.buffers()) if each is not None]
        self._places = self._here()
        self._hooks: list[dict[Any, Any]] = [
            hooks
            for each in modules
            for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks)
        ]
        self._countable = [*self._hooks, *owners]
        self._count = sum(map(len, self._countable))

    @property
    def n_hooks(self) -> int:
        """Number of the modules' hooks that are there now."""
        return sum(map(len, self._hooks))

    def _here(self) -> list[tuple[int, bool, bool]]:
        return [(each.data_ptr(), each.is_contiguous(), each.requires_grad) for each in self.weights]

    def matches(self) -> bool:
        """Say whether all is still as it was."""
        return (
            all(map(is_, [get(name) for get, name in self._owned], self._kept))
            and self._here() == self._places
            and sum(map(len, self._countable)) == self._count
        )
