"""The best score of a run, the weights that reached it, and the levels played."""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta, to_builtins

from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.storage.model_file import policy_arrays
from srwm_rl.storage.model_schema import Score, Steps
from srwm_rl.storage.seen_levels import SeenLevels


class Best(Score):
    """The best score so far, a return; scores `of` different metrics are not compared."""

    steps: Steps  # environment steps when it was measured, as in the log
    error: Annotated[float, Meta(ge=0.0)] = 0.0  # standard error of the score; 0: of an older version, not known

    def __str__(self) -> str:
        return f"{self.of} {self.score:.4g}, at {self.steps:,} steps"


class Scored(NamedTuple):
    """The model that a best score was measured on, as it was then."""

    steps: int
    weights: dict[str, np.ndarray]
    levels_played: dict[str, Any]  # as from `SeenLevels.to_tree`


class BestModelTracker:
    """The best score and the levels played; saved in every checkpoint and restored when the run is resumed.

    A score, the mean of n returns, replaces the best one only if it is higher by more than the standard error of their
    difference, sqrt(error^2 + best_error^2): of many equal models the one with the luckiest episodes is not the best.
    """

    def __init__(self, levels: SeenLevels) -> None:
        self.levels = levels
        self.best: Best | None = None
        self._newest: Scored | None = None
        # The best at the last `to_tree`: an interrupted run is saved in that state, which can be older than `_newest`.
        self._last_saved: Scored | None = None

    def update(self, score: float, metric: str, steps: int, policy: SRWMPolicy, error: float = 0.0) -> None:
        """Keep a score and a copy of the policy's weights if it is better than the best so far.

        Call it while the policy has the very weights that were scored. `error` is the score's standard error; a score
        that is not finite, or whose error is not (that of one episode), is never kept.
        """
        if not (math.isfinite(score) and math.isfinite(error)):
            return
        best = self.best
        if best is not None and best.of == metric and score - best.score <= math.hypot(error, best.error):
            return
        self._newest = Scored(steps, policy_arrays(policy), self.levels.to_tree())
        self.best = Best(score, metric, steps, error)  # last: after an interruption, a best score still has its weights

    def scored(self, steps: int) -> Scored | None:
        """Return the model that was scored at a step if it is the best one, or was at the last `to_tree`.

        None: it is neither, or was scored before this process started.
        """
        kept = (self._newest, self._last_saved)
        return next((scored for scored in kept if scored is not None and scored.steps == steps), None)

    def to_tree(self) -> dict[str, Any]:
        """Return the part of a checkpoint that holds it."""
        self._last_saved = self._newest
        return {"best": to_builtins(self.best), "levels_played": self.levels.to_tree()}

    def from_tree(self, tree: dict[str, Any], source: str) -> None:
        """Restore what `to_tree` returned; a checkpoint of an older version leaves the levels before it unknown."""
        best, levels = tree.get("best"), tree.get("levels_played")
        self.best = best and Best(**best)
        self._newest = self._last_saved = None
        if levels is None:
            self.levels = SeenLevels(self.levels.start, self.levels.stop, complete=False)
        else:
            self.levels = SeenLevels.from_tree(levels, source)
