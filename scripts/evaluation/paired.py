"""Two sides that played the same levels, put beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from srwm_rl.agents.evaluation.comparison import (
    common_thresholds,
    interquartile_mean,
    level_improvement,
    outcomes,
    paired_difference,
    performance_profile,
    rliable_version,
    run_improvement,
)
from srwm_rl.agents.evaluation.statistics import FloatArray, Interval
from srwm_rl.envs.make import normalizer
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.held_out import merged
from srwm_rl.scripts.evaluation.runner import Evaluation, held_out_splits, level_returns, trained_on_of

LevelReturns = dict[str, tuple[list[int], FloatArray]]
"""`game -> (levels, returns [n_levels])`"""


@dataclass(frozen=True)
class ComparedRuns:
    """The runs of one side and how they played the held-out levels."""

    letter: str
    names: list[str]
    trained: list[TrainConfig]
    evaluations: list[Evaluation]

    @property
    def title(self) -> str:
        """Return the side's core, or its run where the letter has to tell two of a kind apart."""
        return f"{self.letter}: {self.trained[0].core}"

    @property
    def label(self) -> str:
        """Return one line on the side."""
        steps = sorted({each["num_timesteps"] for each in self.evaluations})
        trained = " to ".join(f"{each:,}" for each in dict.fromkeys((steps[0], steps[-1])))
        return f"{self.trained[0].core}, {trained} steps, {', '.join(self.names)}"

    def by_run(self) -> list[LevelReturns]:
        """Return each run's returns per level."""
        return [_all_levels(each) for each in self.evaluations]

    def returns(self) -> LevelReturns:
        """Return the mean over the runs of the returns per level."""
        runs = self.by_run()
        return {game: (levels, np.mean([run[game][1] for run in runs], 0)) for game, (levels, _) in runs[0].items()}


def _all_levels(evaluation: Evaluation) -> LevelReturns:
    """Join the held-out splits, which have no level in common."""
    splits = [level_returns(evaluation, split) for split in held_out_splits(evaluation)]
    joined: LevelReturns = {}
    for game in splits[0]:
        levels = [level for each in splits for level in each[game][0]]
        joined[game] = levels, np.concatenate([each[game][1] for each in splits])
    return joined


def compare(sides: tuple[ComparedRuns, ComparedRuns], seed: int) -> dict[str, Any]:
    """Return everything that the table, the JSON file and the page say.

    Args:
        sides: A and B; they played the same levels.
        seed: of the bootstrap.
    """
    first, second = sides
    described = {side.letter: _described(side) for side in sides}
    trained, evaluation = first.trained[0], first.evaluations[0]
    bounds = normalizer(trained.env, trained.mode, pairs(trained.env_kwargs, "env_kwargs"))
    a, b = first.returns(), second.returns()
    rows = [_row(game, [a[game][1]], [b[game][1]], seed) for game in a]
    if len(rows) > 1:
        rows.insert(0, _all_games(a, b, bounds, seed))
    return {
        **described,
        "valid": not any(each["trained_on"] for each in described.values()),
        "env": trained.env,
        "mode": evaluation["mode"],
        "levels": [evaluation["levels"][split] for split in held_out_splits(evaluation)],
        "actions": evaluation["actions"],
        "repeats": evaluation["repeats"],
        "seed": seed,
        "rows": rows,
        "seeds": _over_seeds(first, second, bounds, seed),
        "returns": [
            [game, level, float(x), float(y)]
            for game, (levels, values) in a.items()
            for level, x, y in zip(levels, values, b[game][1], strict=True)
        ],
        "return_fields": ["game", "level", "A", "B"],
    }


def _described(side: ComparedRuns) -> dict[str, Any]:
    trained_on = merged(map(trained_on_of, side.evaluations, side.trained))
    return {"label": side.label, "runs": side.names, "core": side.trained[0].core, "trained_on": trained_on}


def _row(game: str, a: list[FloatArray], b: list[FloatArray], seed: int) -> dict[str, Any]:
    wins, ties, losses = np.sum([outcomes(x, y) for x, y in zip(a, b, strict=True)], axis=0).tolist()
    return {
        "game": game,
        "levels": wins + ties + losses,
        "A": float(np.mean([each.mean() for each in a])),
        "B": float(np.mean([each.mean() for each in b])),
        "normalized": False,
        "difference": interval_json(paired_difference(a, b, seed)),
        "improvement": interval_json(level_improvement(a, b, seed)),
        "wins": wins,
        "ties": ties,
        "losses": losses,
    }


def _all_games(a: LevelReturns, b: LevelReturns, bounds: dict[str, tuple[float, float]], seed: int) -> dict[str, Any]:
    if all(game in bounds for game in a):
        one, other = ([_normalized(of[game][1], bounds[game]) for game in of] for of in (a, b))
        return {**_row("all games", one, other, seed), "normalized": True}
    # Returns of different games have no common unit: their mean would say nothing.
    one, other = ([of[game][1] for game in of] for of in (a, b))
    return {**_row("all games", one, other, seed), "A": None, "B": None, "difference": None}


def _normalized(values: FloatArray, bounds: tuple[float, float]) -> FloatArray:
    return (values - bounds[0]) / (bounds[1] - bounds[0])


def _over_seeds(
    first: ComparedRuns, second: ComparedRuns, bounds: dict[str, tuple[float, float]], seed: int
) -> dict[str, Any] | None:
    """Return the statistics over training seeds, None with a single one on a side or without a common unit."""
    runs = first.by_run(), second.by_run()
    games = list(runs[0][0])
    normalized = all(game in bounds for game in games)
    if min(map(len, runs)) < 2 or (len(games) > 1 and not normalized):
        return None
    scale = {game: bounds[game] if normalized else (0.0, 1.0) for game in games}
    a, b = (np.array([[_normalized(run[g][1], scale[g]).mean() for g in games] for run in side]) for side in runs)
    thresholds = common_thresholds(a, b)
    version = rliable_version()
    sides = {}
    for letter, scores in (("A", a), ("B", b)):
        profile = performance_profile(scores, thresholds, seed)
        sides[letter] = {
            "scores": scores.tolist(),
            "interquartile_mean": interval_json(interquartile_mean(scores, seed)),
            "profile": {name: getattr(profile, name).tolist() for name in ("fractions", "low", "high")},
        }
    return {
        "games": games,
        "unit": "normalised return" if normalized else "return",
        "computed_by": "srwm-rl" if version is None else f"rliable {version}",
        "improvement": interval_json(run_improvement(a, b, seed)),
        "thresholds": thresholds.tolist(),
        **sides,
    }


def interval_json(interval: Interval) -> dict[str, float | None]:
    """Return an interval in JSON's types; ends that say nothing are None."""
    ends = {"low": interval.low, "high": interval.high}
    return {"mean": interval.mean} | {name: value if np.isfinite(value) else None for name, value in ends.items()}
