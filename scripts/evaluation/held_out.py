"""Whether an evaluation's held-out levels were held out: of what was to be played in training, and of what was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from srwm_rl.scripts.config.settings import TrainConfig

if TYPE_CHECKING:
    from srwm_rl.storage.seen_levels import SeenLevels

TrainedOn = dict[str, dict[str, list[int]]]
"""`split -> game -> levels`, only where there are any."""

MAX_NAMED = 10


def levels_trained_on(
    trained: TrainConfig, played: SeenLevels | None, splits: Mapping[str, Sequence[int]]
) -> TrainedOn:
    """Return the levels of held-out splits that belong to the training set.

    To it belong the range that the settings name and whatever the record says was played beside it, as by an
    environment with a mind of its own. Where all levels there are were to be trained on, it is what was played, or all
    of them if that is not known.

    Args:
        trained: the run's settings.
        played: its record of the levels played; None: there is none.
        splits: the levels of each held-out split.
    """
    from srwm_rl.envs.levels import LevelRange
    from srwm_rl.envs.make import resolve

    training = LevelRange.parse(trained.levels)
    found: TrainedOn = {}
    for game in resolve(trained.env).names:
        by_record = str(training) == "all" and played is not None and played.is_complete(game)
        for split, levels in splits.items():
            known = set() if played is None else set(played.among(game, levels))
            met = [level for level in levels if level in known or (not by_record and level in training)]
            if met:
                found.setdefault(split, {})[game] = met
    return found


def merged(parts: Iterable[TrainedOn]) -> TrainedOn:
    """Return what any of several runs was trained on."""
    found: TrainedOn = {}
    for split, game, levels in ((split, game, of[game]) for part in parts for split, of in part.items() for game in of):
        games = found.setdefault(split, {})
        games[game] = sorted({*games.get(game, ()), *levels})
    return found


def count(found: TrainedOn) -> int:
    """Return how many levels these are; one that several games have counts once in each split."""
    return sum(len(set().union(*games.values())) for games in found.values())


def explain(found: TrainedOn) -> list[str]:
    """Say which levels these are, a line for each split and game."""
    return [f"{game}, {split}: {_named(levels)}" for split, games in found.items() for game, levels in games.items()]


def _named(levels: list[int]) -> str:
    more = f" and {len(levels) - MAX_NAMED:,} more" if len(levels) > MAX_NAMED else ""
    return ", ".join(map(str, levels[:MAX_NAMED])) + more


def chosen_note(chosen: Mapping[str, Any]) -> str:
    """Say what a best model was chosen for, and what that means for an evaluation of it."""
    note = f"the model is its run's best by {chosen['of']} ({chosen['score']:.4g})"
    if "held-out" not in chosen["of"]:
        return note
    return f"{note}: on those levels it looks better than it is; evaluate it on others with --eval-levels"
