"""The results of evaluations: summarised, read from files, pooled over runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from srwm_rl.agents.evaluation.comparison import paired_difference
from srwm_rl.agents.evaluation.play_levels import Episode, Episodes
from srwm_rl.agents.evaluation.statistics import FloatArray, difference_interval, mean_interval
from srwm_rl.envs.make import normalizer, resolve
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.held_out import TrainedOn, count, levels_trained_on, merged
from srwm_rl.scripts.evaluation.protocol import EvalConfig
from srwm_rl.storage.model_schema import Score

Evaluation = dict[str, Any]
"""What `srwm-rl eval --json` writes; see `EvaluationFile`."""
Splits = dict[str, Episodes]
Interventions = dict[str, Splits]


def summarise(
    config: EvalConfig,
    trained: TrainConfig,
    n_timesteps: int,
    labels: dict[str, str],
    results: Splits,
    trained_on: TrainedOn,
    interventions: Interventions,
) -> Evaluation:
    """Return the contents of the table and of the JSON file.

    `labels` holds each split's range of levels; `interventions` the splits played with each intervention, by its name.
    With any held-out level in `trained_on` the result is marked invalid.
    """

    def gap(split: str) -> dict[str, Any]:
        train, held_out = (results[name].level_means() for name in ("train", split))
        return {"split": split, **difference_interval(train, held_out, config.seed).to_json()}

    report = {
        "run": config.run,
        "env": trained.env,
        "mode": trained.mode if resolve(trained.env).kind == "procgen" else None,
        "core": trained.core,
        "num_timesteps": n_timesteps,
        "actions": "deterministic" if config.deterministic else "stochastic",
        "repeats": config.repeats,
        "levels": labels,
        "valid": not trained_on,
        "overlap": count(trained_on),
        "trained_on": trained_on,
        "rows": _rows(results, trained, config.seed),
        "generalization_gap": [gap(split) for split in filter(_is_held_out, results) if "train" in results],
        "episodes": _episodes_json(results),
        "episode_fields": ["game", "level", "return", "length", "solved"],
    }
    if interventions:
        report["interventions"] = [
            {
                "name": name,
                "rows": _rows(
                    {f"{name}, {split}": episodes for split, episodes in splits.items()}, trained, config.seed
                ),
                "differences": [
                    row
                    for split, episodes in splits.items()
                    for row in _differences(split, results[split], episodes, config.seed)
                ],
                "episodes": _episodes_json(splits),
            }
            for name, splits in interventions.items()
        ]
    return report


def _rows(splits: Splits, trained: TrainConfig, seed: int) -> list[dict[str, Any]]:
    """Return the table's rows: per split each game's and, of several games, before them that of all together."""
    bounds = normalizer(trained.env, trained.mode, pairs(trained.env_kwargs, "env_kwargs"))
    return [
        {"split": split, "game": game, **_row(chosen, bounds, seed)}
        for split, episodes in splits.items()
        for game, chosen in _by_game(episodes).items()
    ]


def _row(episodes: Episodes, bounds: dict[str, tuple[float, float]], seed: int) -> dict[str, Any]:
    returns, solved, games = episodes.level_means(), episodes.solved(), episodes.games()
    normalized = None
    if set(games) <= bounds.keys():
        # The mean over games of normalised means, as the ProcGen paper aggregates.
        scores = [normalise(episodes.of(game).level_means().mean(), bounds[game]) for game in games]
        normalized = float(sum(scores) / len(scores))
    return {
        "levels": len(returns),
        "return": mean_interval(returns, seed=seed).to_json(),
        "length": sum(episode.length for episode in episodes) / len(episodes),
        "solved": None if solved is None else mean_interval(solved, seed=seed).to_json(),
        "normalized": normalized,
    }


def normalise(returns: Any, bounds: tuple[float, float]) -> Any:
    """Return returns on the scale where the lower bound is 0 and the upper one 1."""
    return (returns - bounds[0]) / (bounds[1] - bounds[0])


def _differences(split: str, unchanged: Episodes, changed: Episodes, seed: int) -> list[dict[str, Any]]:
    """Return, for all games and for each, the unchanged agent minus the changed one, paired by level."""
    games = _by_game(unchanged)
    return [
        {
            "split": split,
            "game": game,
            "several": len(games) > 1,
            "levels": len(episodes.level_means()),
            "return": _difference(episodes, changed, Episodes.level_means, seed),
            "solved": None if episodes.solved() is None else _difference(episodes, changed, Episodes.solved, seed),
        }
        for game, episodes in games.items()
    ]


def _difference(
    first: Episodes, second: Episodes, values: Callable[[Episodes], Any], seed: int
) -> dict[str, float | None]:
    a, b = ([values(episodes.of(game)) for game in first.games()] for episodes in (first, second))
    return paired_difference(a, b, seed).to_json()


def _by_game(episodes: Episodes) -> Splits:
    """Return the episodes of each game and, if there are several, before them those of all."""
    games = {game: episodes.of(game) for game in episodes.games()}
    return games if len(games) == 1 else {"all games": episodes, **games}


def _episodes_json(splits: Splits) -> dict[str, list[list[Any]]]:
    return {split: [list(episode) for episode in sorted(episodes)] for split, episodes in splits.items()}


EpisodeRows = list[tuple[str, int, float, int, bool | None]]


class EpisodesFile(msgspec.Struct):
    """Episodes in an evaluation's file."""

    episodes: dict[str, EpisodeRows]


class InterventionFile(EpisodesFile):
    """An intervention in an evaluation's file, as far as it is read."""

    name: str


class EvaluationFile(EpisodesFile):
    """An evaluation's file, as far as it is read."""

    run: str
    env: str
    mode: str | None
    core: str
    actions: str
    repeats: int
    num_timesteps: int
    levels: dict[str, str]
    trained_on: TrainedOn = {}
    same_first_frame: TrainedOn = {}
    chosen: Score | msgspec.UnsetType = msgspec.UNSET
    interventions: list[InterventionFile] = []


def read_evaluation(path: str) -> Evaluation:
    """Read a file of `srwm-rl eval --json`.

    Raises:
        UserError: no such file, or one of another program.
    """
    try:
        evaluation: Evaluation = json.loads(Path(path).read_text())
        consistent = _is_consistent(msgspec.convert(evaluation, EvaluationFile))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError):  # of JSON, of the schema
        consistent = False
    if not consistent:
        raise UserError(f"{path} was not written by srwm-rl eval --json; give a file that was")
    return evaluation


def _is_consistent(file: EvaluationFile) -> bool:
    """Whether all splits are labelled and have the same games, and interventions the same levels as the agent."""
    parts: list[EpisodesFile] = [file, *file.interventions]
    every_split = [rows for part in parts for rows in part.episodes.values()]
    return (
        any(map(_is_held_out, file.episodes))
        and all(name in file.levels or name.startswith("random, ") for name in file.episodes)
        and all(part.episodes for part in file.interventions)
        and all(every_split)
        and len({frozenset(game for game, *_ in rows) for rows in every_split}) == 1
        and all(math.isfinite(row[2]) for rows in every_split for row in rows)
        and all(
            _levels_played(file.episodes.get(split, [])) == _levels_played(rows)
            for part in file.interventions
            for split, rows in part.episodes.items()
        )
    )


def _levels_played(rows: EpisodeRows) -> set[tuple[str, int]]:
    return {(game, level) for game, level, *_ in rows}


def pool(evaluations: list[Evaluation], trained: TrainConfig, seed: int) -> Evaluation:
    """Summarise the episodes of one run, or of several that differ in their seed alone, as one agent's."""
    first = evaluations[0]
    for other in evaluations:
        same = all(other[name] == first[name] for name in ("env", "mode", "core", "actions", "repeats", "levels"))
        if not same or set(other["episodes"]) != set(first["episodes"]):
            raise UserError("the evaluations of runs with the same settings differ in levels, repeats or actions")
    interventions = [
        {part["name"]: part["episodes"] for part in evaluation.get("interventions", [])} for evaluation in evaluations
    ]
    if any(list(other) != list(interventions[0]) for other in interventions):
        raise UserError("the evaluations of runs with the same settings differ in what was frozen")
    config = EvalConfig(
        run=first["run"], repeats=first["repeats"], deterministic=first["actions"] == "deterministic", seed=seed
    )
    return summarise(
        config,
        trained,
        first["num_timesteps"],
        first["levels"],
        _pooled([evaluation["episodes"] for evaluation in evaluations]),
        merged(trained_on_of(evaluation, trained) for evaluation in evaluations),
        {name: _pooled([by_name[name] for by_name in interventions]) for name in interventions[0]},
    )


def _pooled(evaluations: list[dict[str, list[list[Any]]]]) -> Splits:
    return {split: _episodes(*(splits.get(split, []) for splits in evaluations)) for split in evaluations[0]}


def _episodes(*parts: list[list[Any]]) -> Episodes:
    return Episodes(Episode(*row) for rows in parts for row in rows)


def trained_on_of(evaluation: Evaluation, trained: TrainConfig) -> TrainedOn:
    """Return the held-out levels that were trained on; in a file of an older version, by the run's settings."""
    if "trained_on" in evaluation:
        trained_on: TrainedOn = evaluation["trained_on"]
        return trained_on
    levels = {split: sorted({row[1] for row in evaluation["episodes"][split]}) for split in held_out_splits(evaluation)}
    return levels_trained_on(trained, None, levels)


def level_returns(evaluation: Evaluation, split: str) -> dict[str, tuple[list[int], FloatArray]]:
    """Return `game -> (levels, mean returns [n_levels])` of a split, by level."""
    episodes = _episodes(evaluation["episodes"][split])
    games = {game: episodes.of(game) for game in episodes.games()}
    return {game: (sorted({episode.level for episode in of}), of.level_means()) for game, of in games.items()}


def held_out_splits(evaluation: Evaluation) -> list[str]:
    """Return the names of the held-out splits, in the order in which they were played."""
    return list(filter(_is_held_out, evaluation["episodes"]))


def _is_held_out(split: str) -> bool:
    return split == "held-out" or split.startswith("held-out ")
