"""Compare two sides, each of one or several runs, that play the same held-out levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from srwm_rl.agents.evaluation.play_levels import Episodes
from srwm_rl.agents.evaluation.statistics import (
    FloatArray,
    common_thresholds,
    interquartile_mean,
    mean_interval,
    outcomes,
    paired_difference,
    performance_profile,
    rliable_version,
    run_improvement,
    t_interval,
    welch_interval,
)
from srwm_rl.envs.make import normalizer
from srwm_rl.scripts.cli import check_device
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.comparable import check_comparable
from srwm_rl.scripts.evaluation.load_agent import open_agent
from srwm_rl.scripts.evaluation.protocol import PlayOptions, choose_splits, merged, with_own_draws
from srwm_rl.scripts.evaluation.results import Evaluation, held_out_splits, normalise
from srwm_rl.scripts.evaluation.runner import evaluate


@dataclass(frozen=True)
class ComparedRuns:
    """The runs of one side and their evaluations on the held-out levels."""

    names: Sequence[str]
    trained: list[TrainConfig]
    evaluations: list[Evaluation]

    def describe(self) -> dict[str, Any]:
        """Return what the report says on the side itself."""
        steps = [evaluation["num_timesteps"] for evaluation in self.evaluations]
        trained = " to ".join(f"{n:,}" for n in dict.fromkeys((min(steps), max(steps))))
        return {
            "label": f"{self.trained[0].core}, {trained} steps, {', '.join(self.names)}",
            "runs": list(self.names),
            "core": self.trained[0].core,
            "trained_on": merged(evaluation["trained_on"] for evaluation in self.evaluations),
        }

    def episodes(self) -> list[dict[str, Episodes]]:
        """Return each run's episodes on all held-out levels, by game."""
        return [
            Episodes(chain(*(evaluation["episodes"][split] for split in held_out_splits(evaluation)))).games()
            for evaluation in self.evaluations
        ]

    def returns(self) -> dict[str, FloatArray]:
        """Return for each game the returns of every run and level, `[n_runs, n_levels]`."""
        runs = self.episodes()
        return {game: np.stack([run[game].level_means() for run in runs]) for game in runs[0]}


def evaluate_sides(options: PlayOptions, sides: Sequence[Sequence[str]]) -> list[ComparedRuns]:
    """Check that all runs of two sides can be compared, then evaluate them.

    Raises:
        UserError: other environments, other held-out levels, or levels that one of them was trained on.
    """
    device = check_device(options.device)
    by_side = (with_own_draws(options.eval_config(run, train_levels="none") for run in runs) for runs in sides)
    configs = {config.run: config for config in chain(*by_side)}
    agents = {run: open_agent(config, device) for run, config in configs.items()}
    trained = {run: settings for run, (_, settings) in agents.items()}
    check_comparable(trained, named_levels=bool(options.eval_levels))
    for run, (agent, settings) in agents.items():
        choose_splits(configs[run], settings, getattr(agent, "levels_played", None))
    first = sides[0][0]  # the baselines are the same for all
    configs = {run: replace(config, baselines=config.baselines and run == first) for run, config in configs.items()}
    return [
        ComparedRuns(runs, [trained[run] for run in runs], [evaluate(configs[run]) for run in runs]) for runs in sides
    ]


def compare(sides: Sequence[ComparedRuns], seed: int) -> dict[str, Any]:
    """Return the contents of the table, the JSON file and the page on A and B, which played the same levels."""
    descriptions = {letter: side.describe() for letter, side in zip("AB", sides, strict=True)}
    trained, evaluation = sides[0].trained[0], sides[0].evaluations[0]
    bounds = normalizer(trained.env, trained.mode, pairs(trained.env_kwargs, "env_kwargs"), trained.attempts)
    first, (a, b) = sides[0].episodes()[0], (side.returns() for side in sides)
    rows = [_row(game, [a[game]], [b[game]], seed) for game in a]
    normalized = a.keys() <= bounds.keys()
    scaled = [[normalise(side[game], bounds[game]) if normalized else side[game] for game in a] for side in (a, b)]
    if len(rows) > 1:
        # Returns of different games have no common unit: their mean is not reported.
        changes = {"normalized": True} if normalized else {"A": None, "B": None, "difference": None}
        rows.insert(0, _row("all games", scaled[0], scaled[1], seed) | changes)
    has_seeds = min(len(side.names) for side in sides) > 1 and (normalized or len(a) == 1)
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
        "baselines": _baselines(evaluation, a, b, seed),
        "seeds": _over_seeds([*a], scaled, normalized, seed) if has_seeds else None,
        "returns": [
            [game, level, float(x), float(y)]
            for game in a
            for level, x, y in zip(first[game].levels(), a[game].mean(0), b[game].mean(0), strict=True)
        ],
        "return_fields": ["game", "level", "A", "B"],
    }


def _baselines(
    evaluation: Evaluation, a: dict[str, FloatArray], b: dict[str, FloatArray], seed: int
) -> list[dict[str, Any]]:
    """Return, for each game and baseline, its return and by how much A and B are above it, paired by level."""
    held_out = held_out_splits(evaluation)
    by_name = {
        part["name"]: [part["episodes"][split] for split in held_out] for part in evaluation.get("baselines", ())
    }
    if by_name:
        by_name = {"random play": [evaluation["episodes"][f"random, {split}"] for split in held_out], **by_name}
    rows = []
    for name, splits in by_name.items():
        for game, episodes in Episodes(chain(*splits)).games().items():
            returns = episodes.level_means()
            above = {
                letter: paired_difference([side[game].mean(0)], [returns], seed).to_json()
                for letter, side in (("A", a), ("B", b))
            }
            rows.append({"name": name, "game": game, "return": mean_interval(returns, seed=seed).to_json(), **above})
    return rows


def _row(game: str, a: list[FloatArray], b: list[FloatArray], seed: int) -> dict[str, Any]:
    """Compare returns per game, run and level, `[n_runs, n_levels]` each, as means over the runs."""
    first, second = ([returns.mean(0) for returns in side] for side in (a, b))
    results = outcomes(first, second)
    wins, ties, losses = (sum(int((of == value).sum()) for of in results) for value in (1, 0.5, 0))
    return {
        "game": game,
        "levels": wins + ties + losses,
        "A": float(np.mean([returns.mean() for returns in first])),
        "B": float(np.mean([returns.mean() for returns in second])),
        "normalized": False,
        "difference": paired_difference(first, second, seed).to_json(),
        "improvement": mean_interval(*results, seed=seed).to_json(),
        "wins": wins,
        "ties": ties,
        "losses": losses,
    }


def _over_seeds(games: list[str], returns: list[list[FloatArray]], normalized: bool, seed: int) -> dict[str, Any]:
    """Return the statistics over training seeds of returns per side and game, `[n_runs, n_levels]` each."""
    a, b = (np.stack([of_game.mean(1) for of_game in side], 1) for side in returns)  # [n_runs, n_games]
    thresholds = common_thresholds(a, b)
    version = rliable_version()
    sides = {}
    for letter, scores in (("A", a), ("B", b)):
        profile = zip(("fractions", "low", "high"), performance_profile(scores, thresholds, seed), strict=True)
        sides[letter] = {
            "scores": scores.tolist(),
            "mean": t_interval(scores.mean(1)).to_json(),
            "interquartile_mean": interquartile_mean(scores, seed).to_json(),
            "profile": {name: values.tolist() for name, values in profile},
        }
    return {
        "games": games,
        "unit": "normalised return" if normalized else "return",
        "computed_by": "srwm-rl" if version is None else f"rliable {version}",
        "difference": welch_interval(a.mean(1), b.mean(1)).to_json(),
        "improvement": run_improvement(a, b, seed).to_json(),
        "thresholds": thresholds.tolist(),
        **sides,
    }
