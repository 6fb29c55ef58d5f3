"""The numbers of a report's tables: returns per game and per level, and published scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from srwm_rl.agents.evaluation.statistics import difference_interval
from srwm_rl.envs.make import normalizer, resolve
from srwm_rl.envs.procgen.published import PROCGEN_EASY, SRWM_PAPER_GAMES
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.results import Evaluation, held_out_splits, level_returns

N_SHADES = 9
MAX_LARGE_CELLS = 400  # levels; more cells of the usual size would fill a phone's screen


class GameRow(NamedTuple):
    """One game's results."""

    game: str
    """Its name, or "all games"."""
    cells: dict[str, dict[str, Any]]
    """By split, the evaluation's row."""
    gaps: dict[str, dict[str, float | None]]
    """By held-out split, training minus held-out return: mean, low, high."""


def returns_by_game(evaluation: Evaluation, seed: int) -> list[GameRow]:
    """Return a row per game, the one for all games first; `seed` is the bootstrap's."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in evaluation["rows"]:
        rows.setdefault(row["game"], {})[row["split"]] = row
    first = next(iter(rows))
    overall = {gap["split"]: gap for gap in evaluation["generalization_gap"]}
    return [
        GameRow(game, cells, overall if game == first else _gaps(evaluation, game, seed))
        for game, cells in rows.items()
    ]


def _gaps(evaluation: Evaluation, game: str, seed: int) -> dict[str, dict[str, float | None]]:
    if "train" not in evaluation["episodes"]:
        return {}
    train = level_returns(evaluation, "train")[game][1]
    gaps = {}
    for split in held_out_splits(evaluation):
        interval = difference_interval(train, level_returns(evaluation, split)[game][1], seed)
        ends = (float(value) if np.isfinite(value) else None for value in interval)
        gaps[split] = dict(zip(("mean", "low", "high"), ends, strict=True))
    return gaps


class LevelMap(NamedTuple):
    """A value per level of one game and split."""

    game: str
    split: str
    cells: list[tuple[int, float, int]]  # level, value, shade
    low: float  # the value of the lightest shade
    high: float
    small: bool  # draw small cells, because there are many


def level_maps(evaluation: Evaluation) -> dict[str, list[LevelMap]]:
    """Return `game -> maps of returns`, one for each split that the agent played, on one scale per game."""
    splits = [name for name in evaluation["episodes"] if name == "train" or name in held_out_splits(evaluation)]
    returns = {split: level_returns(evaluation, split) for split in splits}
    maps: dict[str, list[LevelMap]] = {}
    for game in sorted(set().union(*returns.values())):
        by_split = {split: games[game] for split, games in returns.items() if game in games}
        values = np.concatenate([means for _, means in by_split.values()])
        low, high = float(values.min()), float(values.max())
        small = max(len(levels) for levels, _ in by_split.values()) > MAX_LARGE_CELLS
        for split, means in by_split.items():
            cells = [(level, float(mean), shade(float(mean), low, high)) for level, mean in zip(*means, strict=True)]
            maps.setdefault(game, []).append(LevelMap(game, split, cells, low, high, small))
    return maps


def difference_maps(differences: dict[str, dict[int, float]]) -> list[LevelMap]:
    """Return a map per game of the differences by level; only a difference of 0 has the middle shade."""
    maps, middle = [], N_SHADES // 2
    for game, by_level in differences.items():
        high = max(1e-9, *(abs(value) for value in by_level.values()))
        cells = [
            (level, float(value), middle + int(np.sign(value) * np.ceil(middle * abs(value) / high)))
            for level, value in by_level.items()
        ]
        maps.append(LevelMap(game, "", cells, -high, high, len(cells) > MAX_LARGE_CELLS))
    return maps


def shade(value: float, low: float, high: float) -> int:
    """Return the index of the shade, out of `N_SHADES`, of a value between `low` and `high`."""
    if high <= low:
        return N_SHADES // 2
    return min(N_SHADES - 1, max(0, int(N_SHADES * (value - low) / (high - low))))


def published_scores(trained: TrainConfig, num_timesteps: int) -> dict[str, Any] | None:
    """Return the published scores on a run's games; None if there are none for its settings."""
    spec = resolve(trained.env)
    if spec.kind != "procgen" or trained.mode != "easy":
        return None
    columns = [column for column in PROCGEN_EASY if set(spec.names) & set(column.scores)]
    notes = {column.source: column.note for column in columns}
    numbers = {source: number for number, source in enumerate(notes, 1)}
    return {
        "columns": [(column, numbers[column.source]) for column in columns],
        "sources": [(numbers[source], source, note) for source, note in notes.items()],
        "steps_per_game": num_timesteps / len(spec.names),
        "paper": tuple(sorted(spec.names)) == SRWM_PAPER_GAMES,
    }


def is_normalised(trained: TrainConfig) -> bool:
    """Return whether normalised scores exist for some game of a run."""
    return bool(normalizer(trained.env, trained.mode, pairs(trained.env_kwargs, "env_kwargs")))
