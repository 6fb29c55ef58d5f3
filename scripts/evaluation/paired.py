"""Compare two sides, each of one or several runs, that play the same held-out levels."""

from __future__ import annotations

from collections.abc import Sequence
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
from srwm_rl.agents.evaluation.statistics import FloatArray
from srwm_rl.envs.make import normalizer, resolve
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.held_out import merged
from srwm_rl.scripts.evaluation.load_agent import open_agent
from srwm_rl.scripts.evaluation.protocol import PlayOptions, choose_splits
from srwm_rl.scripts.evaluation.results import (
    Evaluation,
    held_out_splits,
    level_returns,
    normalise,
    trained_on_of,
)
from srwm_rl.scripts.evaluation.runner import evaluate

LevelReturns = dict[str, tuple[list[int], FloatArray]]
"""`game -> (levels, returns [n_levels])`"""


@dataclass(frozen=True)
class ComparedRuns:
    """The runs of one side and their evaluations on the held-out levels."""

    letter: str
    names: Sequence[str]
    trained: list[TrainConfig]
    evaluations: list[Evaluation]

    @property
    def title(self) -> str:
        """The side's letter and core."""
        return f"{self.letter}: {self.trained[0].core}"

    @property
    def label(self) -> str:
        """One line on the side."""
        steps = sorted({evaluation["num_timesteps"] for evaluation in self.evaluations})
        trained = " to ".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1])))
        return f"{self.trained[0].core}, {trained} steps, {', '.join(self.names)}"

    def by_run(self) -> list[LevelReturns]:
        """Return each run's returns per level."""
        return [_all_levels(evaluation) for evaluation in self.evaluations]

    def returns(self) -> LevelReturns:
        """Return the mean over the runs of the returns per level."""
        runs = self.by_run()
        return {game: (levels, np.mean([run[game][1] for run in runs], 0)) for game, (levels, _) in runs[0].items()}


def _all_levels(evaluation: Evaluation) -> LevelReturns:
    """Join the held-out splits, which have no level in common."""
    splits = [level_returns(evaluation, split) for split in held_out_splits(evaluation)]
    joined: LevelReturns = {}
    for game in splits[0]:
        levels = [level for split in splits for level in split[game][0]]
        joined[game] = levels, np.concatenate([split[game][1] for split in splits])
    return joined


def evaluate_sides(options: PlayOptions, sides: Sequence[Sequence[str]]) -> list[ComparedRuns]:
    """Check that all runs of two sides can be compared, then evaluate them.

    Raises:
        UserError: other environments, other held-out levels, or levels that one of them was trained on.
    """
    device = check_device(options.device)
    configs = {run: options.eval_config(run, train_levels="none") for runs in sides for run in runs}
    agents = {run: open_agent(config, device) for run, config in configs.items()}
    trained = {run: settings for run, (_, settings, _) in agents.items()}
    _check_comparable(trained, named_levels=bool(options.eval_levels))
    for run, (agent, settings, _) in agents.items():
        choose_splits(configs[run], settings, getattr(agent, "levels_played", None))
    return [
        ComparedRuns(letter, runs, [trained[run] for run in runs], [evaluate(configs[run]) for run in runs])
        for letter, runs in zip("AB", sides, strict=True)
    ]


def _check_comparable(trained: dict[str, TrainConfig], named_levels: bool) -> None:
    """Refuse runs of different environments or, unless levels are named, with different held-out levels."""
    (first_run, first), *others = trained.items()
    for run, other in others:
        for what, (a, b) in {
            "environment": (_environment(first), _environment(other)),
            "mode": (first.mode, other.mode),
            "settings of the environment": (sorted(first.env_kwargs), sorted(other.env_kwargs)),
        }.items():
            if a != b:
                raise UserError(
                    f"only agents of one environment can be compared, but {first_run} and {run} differ in {what}: "
                    f"{a or 'none'} and {b or 'none'}"
                )
        if not named_levels and first.eval_levels != other.eval_levels:
            raise UserError(
                f"{first_run} holds out levels {first.eval_levels}, {run} {other.eval_levels}; "
                "name levels that neither was trained on with --eval-levels"
            )


def _environment(trained: TrainConfig) -> str:
    return ",".join(sorted(resolve(trained.env).names))


def compare(sides: Sequence[ComparedRuns], seed: int) -> dict[str, Any]:
    """Return the contents of the table, the JSON file and the page on A and B, which played the same levels."""
    first, second = sides
    descriptions = {
        side.letter: {
            "label": side.label,
            "runs": list(side.names),
            "core": side.trained[0].core,
            "trained_on": merged(map(trained_on_of, side.evaluations, side.trained)),
        }
        for side in sides
    }
    trained, evaluation = first.trained[0], first.evaluations[0]
    bounds = normalizer(trained.env, trained.mode, pairs(trained.env_kwargs, "env_kwargs"))
    a, b = first.returns(), second.returns()
    rows = [_row(game, [a[game][1]], [b[game][1]], seed) for game in a]
    if len(rows) > 1:
        rows.insert(0, _all_games(a, b, bounds, seed))
    return {
        **descriptions,
        "valid": not any(side["trained_on"] for side in descriptions.values()),
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


def _row(game: str, a: list[FloatArray], b: list[FloatArray], seed: int) -> dict[str, Any]:
    wins, ties, losses = np.sum([outcomes(x, y) for x, y in zip(a, b, strict=True)], axis=0).tolist()
    return {
        "game": game,
        "levels": wins + ties + losses,
        "A": float(np.mean([returns.mean() for returns in a])),
        "B": float(np.mean([returns.mean() for returns in b])),
        "normalized": False,
        "difference": paired_difference(a, b, seed).to_json(),
        "improvement": level_improvement(a, b, seed).to_json(),
        "wins": wins,
        "ties": ties,
        "losses": losses,
    }


def _all_games(a: LevelReturns, b: LevelReturns, bounds: dict[str, tuple[float, float]], seed: int) -> dict[str, Any]:
    normalized = all(game in bounds for game in a)
    scale = bounds if normalized else dict.fromkeys(a, (0.0, 1.0))
    first, second = ([normalise(side[game][1], scale[game]) for game in a] for side in (a, b))
    row = {**_row("all games", first, second, seed), "normalized": normalized}
    # Returns of different games have no common unit: their mean is not reported.
    return row if normalized else row | {"A": None, "B": None, "difference": None}


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
    a, b = (np.array([[normalise(run[g][1], scale[g]).mean() for g in games] for run in side]) for side in runs)
    thresholds = common_thresholds(a, b)
    version = rliable_version()
    sides = {}
    for letter, scores in (("A", a), ("B", b)):
        profile = performance_profile(scores, thresholds, seed)
        sides[letter] = {
            "scores": scores.tolist(),
            "interquartile_mean": interquartile_mean(scores, seed).to_json(),
            "profile": {name: getattr(profile, name).tolist() for name in ("fractions", "low", "high")},
        }
    return {
        "games": games,
        "unit": "normalised return" if normalized else "return",
        "computed_by": "srwm-rl" if version is None else f"rliable {version}",
        "improvement": run_improvement(a, b, seed).to_json(),
        "thresholds": thresholds.tolist(),
        **sides,
    }
