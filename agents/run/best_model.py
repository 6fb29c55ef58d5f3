"""What a run keeps of its past beside its state: the best score with the weights it belongs to, the levels played."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.storage.model_file import policy_arrays
from srwm_rl.storage.seen_levels import SeenLevels


@dataclass(frozen=True)
class Best:
    """The best score so far.

    Attributes:
        score: a return; more is better.
        of: what it is the score of; scores of other things are not compared with it.
        steps: environment steps when it was measured, as in the log.
    """

    score: float
    of: str
    steps: int

    def __str__(self) -> str:
        return f"{self.of} {self.score:.4g}, at {self.steps:,} steps"


class Scored(NamedTuple):
    """The model that a best score was measured on, as it was at that moment."""

    steps: int
    weights: dict[str, np.ndarray]
    levels_played: dict[str, Any]  # as from `SeenLevels.to_tree`


class BestModelTracker:
    """The best score and the levels played; part of every checkpoint, so that a resumed run goes on with both.

    Args:
        levels: the record of the levels played.
    """

    def __init__(self, levels: SeenLevels) -> None:
        self.levels = levels
        self.best: Best | None = None
        # The state that an interrupted run is saved in may be older than the newest score, by any number of scores.
        self._newest: Scored | None = None
        self._last_saved: Scored | None = None  # what the best was when `to_tree` last told it

    def update(self, score: float, of: str, steps: int, policy: SRWMPolicy) -> None:
        """Keep a score and a copy of its weights, if it is better than the best so far; NaN never is.

        Call it while the policy has the very weights that were scored.
        """
        comparable = self.best is not None and self.best.of == of
        if not math.isfinite(score) or (comparable and score <= self.best.score):  # type: ignore[union-attr]
            return
        self._newest = Scored(steps, policy_arrays(policy), self.levels.to_tree())
        self.best = Best(score, of, steps)  # last: whatever interrupts this leaves a best score with its weights

    def scored(self, steps: int) -> Scored | None:
        """Return the model that was scored at a step, if it is the best one, or was when `to_tree` was called last.

        None: it is neither, or of before this process.
        """
        return next(
            (each for each in (self._newest, self._last_saved) if each is not None and each.steps == steps), None
        )

    def to_tree(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        self._last_saved = self._newest
        return {
            "best": None if self.best is None else asdict(self.best),
            "levels_played": self.levels.to_tree(),
        }

    def from_tree(self, tree: dict[str, Any], source: str) -> None:
        """Take up what `to_tree` gave; of an older version's checkpoint, that the levels before it are not known.

        Raises:
            UserError: the record of the levels is damaged.
        """
        best, levels = tree.get("best"), tree.get("levels_played")
        self.best = None if best is None else Best(**best)
        self._newest = self._last_saved = None
        if levels is None:
            self.levels = SeenLevels(self.levels.start, self.levels.stop, complete=False)
        else:
            self.levels = SeenLevels.from_tree(levels, source)
