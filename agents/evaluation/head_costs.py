"""What lesioning each head of an agent costs, as it is stored and shown."""

from __future__ import annotations

from typing import Annotated

import msgspec

Index = Annotated[int, msgspec.Meta(ge=0, lt=10**6)]


class HeadCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What lesioning one head costs: the return as it is minus that without the head's edits, paired by level."""

    layer: Index
    head: Index
    game: str
    mean: float
    low: float | None  # of the 95% interval; None: unknown, of a single level
    high: float | None

    @property
    def name(self) -> str:
        """Return the head's name on the command line, such as 0.3."""
        return f"{self.layer}.{self.head}"

    @property
    def earns(self) -> bool:
        """Whether the edits earn something: the interval of their cost lies above 0."""
        return self.low is not None and self.low > 0


class HeadCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The costs of all heads of one model."""

    model: str  # the model file's sha256
    num_timesteps: int
    levels: str  # start:stop, held out
    actions: str
    costs: tuple[HeadCost, ...]

    def ranked(self, game: str) -> list[HeadCost]:
        """Return the costs on one game, the highest first."""
        return sorted((cost for cost in self.costs if cost.game == game), key=lambda cost: -cost.mean)
