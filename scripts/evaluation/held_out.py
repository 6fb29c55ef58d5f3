"""Check that held-out levels were held out: against the range trained on, and against the levels really played."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from srwm_rl.envs.levels import LevelRange
from srwm_rl.envs.make import resolve
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.storage.seen_levels import SeenLevels

TrainedOn = dict[str, dict[str, list[int]]]
"""`split -> game -> levels` that were trained on, without empty entries."""

MAX_LISTED = 10


def levels_trained_on(trained: TrainConfig, seen: SeenLevels | None, splits: Mapping[str, Sequence[int]]) -> TrainedOn:
    """Return the levels of held-out splits that belong to the training set.

    It consists of the range in the settings and of what the record holds beyond it, as of an environment that chooses
    levels itself. If the range is "all", it is what was played or, without a complete record, every level.
    """
    training = LevelRange.parse(trained.levels)
    trained_on: TrainedOn = {}
    for game in resolve(trained.env).names:
        by_record = str(training) == "all" and seen is not None and seen.is_complete(game)
        for split, levels in splits.items():
            recorded = set() if seen is None else set(seen.among(game, levels))
            overlap = [level for level in levels if level in recorded or (not by_record and level in training)]
            if overlap:
                trained_on.setdefault(split, {})[game] = overlap
    return trained_on


def merged(parts: Iterable[TrainedOn]) -> TrainedOn:
    """Return the levels that any of several runs was trained on."""
    union: TrainedOn = {}
    for part in parts:
        for split, games in part.items():
            for game, levels in games.items():
                merged_games = union.setdefault(split, {})
                merged_games[game] = sorted({*merged_games.get(game, ()), *levels})
    return union


def count(trained_on: TrainedOn) -> int:
    """Return the number of levels; a level of several games counts once in each split."""
    return sum(len(set().union(*games.values())) for games in trained_on.values())


def explain(trained_on: TrainedOn) -> list[str]:
    """Return a line that lists the levels for each split and game."""
    lines = []
    for split, games in trained_on.items():
        for game, levels in games.items():
            more = f" and {len(levels) - MAX_LISTED:,} more" if len(levels) > MAX_LISTED else ""
            lines.append(f"{game}, {split}: {', '.join(map(str, levels[:MAX_LISTED]))}{more}")
    return lines


def chosen_note(chosen: Mapping[str, Any]) -> str:
    """Return by what score a best model was chosen, and what that means for its evaluation."""
    note = f"the model is its run's best by {chosen['of']} ({chosen['score']:.4g})"
    if "held-out" not in chosen["of"]:
        return note
    return f"{note}: on those levels it looks better than it is; evaluate it on others with --eval-levels"
