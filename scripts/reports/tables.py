"""What a page says of an evaluation, in numbers: returns per game, per level, and beside published ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from srwm_rl.agents.evaluation.statistics import FloatArray, difference_interval
from srwm_rl.envs.make import normalizer, resolve
from srwm_rl.envs.procgen.published import PROCGEN_EASY, SRWM_PAPER_GAMES, Published
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.results import Evaluation, held_out_splits, level_returns

N_SHADES = 9
MANY = 400  # levels, of which cells of the usual size would fill a phone's screen
Bounds = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class GameRow:
    """One game's results.

    Attributes:
        game: its name, or "all games".
        cells: by split, the evaluation's own row.
        gaps: by held-out split, training minus held-out return: mean, low, high.
    """

    game: str
    cells: dict[str, dict[str, Any]]
    gaps: dict[str, dict[str, float | None]]


def returns_by_game(evaluation: Evaluation, seed: int) -> list[GameRow]:
    """Return a row per game, the one for all games first, as in the evaluation's own table."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in evaluation["rows"]:
        rows.setdefault(row["game"], {})[row["split"]] = row
    overall = {gap["split"]: gap for gap in evaluation["generalization_gap"]}
    several = "all games" in rows
    result = []
    for game, cells in rows.items():
        gaps = overall if game == "all games" or not several else _gaps(evaluation, game, seed)
        result.append(GameRow(game, cells, gaps))
    return result


def _gaps(evaluation: Evaluation, game: str, seed: int) -> dict[str, dict[str, float | None]]:
    if "train" not in evaluation["episodes"]:
        return {}
    train = level_returns(evaluation, "train")[game][1]
    gaps = {}
    for split in held_out_splits(evaluation):
        mean, low, high = difference_interval(train, level_returns(evaluation, split)[game][1], seed)
        gaps[split] = {"mean": mean, "low": finite(low), "high": finite(high)}
    return gaps


def finite(value: float) -> float | None:
    """Return None for the infinite end of an interval that says nothing."""
    return None if abs(value) == float("inf") else float(value)


@dataclass(frozen=True)
class LevelMap:
    """Returns per level of one game and split.

    Attributes:
        game: the game.
        split: the split's name.
        cells: `(level, value, shade)`, by level.
        low: the value of the lightest shade.
        high: the value of the darkest shade.
        small: draw small cells, for there are many.
    """

    game: str
    split: str
    cells: list[tuple[int, float, int]]
    low: float
    high: float
    small: bool


def level_maps(evaluation: Evaluation) -> dict[str, list[LevelMap]]:
    """Return `game -> its maps`, one for each split played by the agent, all of a game in the same shades."""
    splits = [name for name in evaluation["episodes"] if name == "train" or name in held_out_splits(evaluation)]
    returns = {split: level_returns(evaluation, split) for split in splits}
    maps: dict[str, list[LevelMap]] = {}
    for game in sorted({game for of in returns.values() for game in of}):
        values = np.concatenate([of[game][1] for of in returns.values() if game in of])
        low, high = float(values.min()), float(values.max())
        small = max(len(of[game][0]) for of in returns.values() if game in of) > MANY
        for split, of in returns.items():
            if game in of:
                cells = [(n, float(v), shade(float(v), low, high)) for n, v in zip(*of[game], strict=True)]
                maps.setdefault(game, []).append(LevelMap(game, split, cells, low, high, small))
    return maps


def difference_maps(returns: dict[str, tuple[list[int], FloatArray]]) -> list[LevelMap]:
    """Return a map per game of differences per level; the middle shade stands for none."""
    maps = []
    for game, (levels, values) in returns.items():
        most = max(float(np.abs(values).max()), 1e-9)
        cells = [(n, float(v), _signed_shade(float(v), most)) for n, v in zip(levels, values, strict=True)]
        maps.append(LevelMap(game, "", cells, -most, most, len(cells) > MANY))
    return maps


def shade(value: float, low: float, high: float) -> int:
    """Return which of the `N_SHADES` shades a value between `low` and `high` has."""
    if high <= low:
        return N_SHADES // 2
    return min(N_SHADES - 1, max(0, int(N_SHADES * (value - low) / (high - low))))


def _signed_shade(value: float, most: float) -> int:
    # Only no difference at all is drawn as none.
    middle = N_SHADES // 2
    return middle + int(np.sign(value) * np.ceil(middle * abs(value) / most))


@dataclass(frozen=True)
class PublishedTable:
    """Published scores on the games of a run, and how the budgets compare.

    Attributes:
        columns: each with the number of its source.
        sources: number, address and what its numbers are.
        steps_per_game: of the run.
        paper: whether the games are the SRWM paper's six.
    """

    columns: list[tuple[Published, int]]
    sources: list[tuple[int, str, str]]
    steps_per_game: float
    paper: bool


def published_scores(trained: TrainConfig, num_timesteps: int) -> PublishedTable | None:
    """Return the published scores to show beside a run's, None where there are none for its settings."""
    spec = resolve(trained.env)
    if spec.kind != "procgen" or trained.mode != "easy":
        return None
    columns = [each for each in PROCGEN_EASY if set(spec.names) & set(each.scores)]
    notes = {each.source: each.note for each in columns}
    numbers = {source: number for number, source in enumerate(notes, 1)}
    return PublishedTable(
        [(each, numbers[each.source]) for each in columns],
        [(numbers[source], source, note) for source, note in notes.items()],
        num_timesteps / len(spec.names),
        tuple(sorted(spec.names)) == SRWM_PAPER_GAMES,
    )


def score_bounds(trained: TrainConfig) -> Bounds:
    """Return `game -> (return worth 0, return worth 1)` where that is known."""
    return normalizer(trained.env, trained.mode, pairs(trained.env_kwargs, "env_kwargs"))
