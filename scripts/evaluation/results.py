"""The results of evaluations: summarised, read from files, pooled over runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from srwm_rl.agents.evaluation.play_levels import Episode, Episodes
from srwm_rl.agents.evaluation.statistics import FloatArray, difference_interval, mean_interval, paired_difference
from srwm_rl.envs.make import normalizer
from srwm_rl.errors import UserError
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.protocol import TrainedOn, count, levels_trained_on, merged
from srwm_rl.storage.model_schema import Score

Evaluation = dict[str, Any]
"""What `srwm-rl eval --json` writes; see `EvaluationFile`."""
Splits = dict[str, Episodes]
Bounds = dict[str, tuple[float, float]]


def summarise(evaluation: Evaluation, trained: TrainConfig, seed: int) -> Evaluation:
    """Return an evaluation with what follows from its episodes: the numbers of the table, and whether it is valid."""
    splits, trained_on = evaluation["episodes"], evaluation["trained_on"]
    bounds = normalizer(trained.env, trained.mode, pairs(trained.env_kwargs, "env_kwargs"))
    means = {split: episodes.level_means() for split, episodes in splits.items()}
    report = evaluation | {
        "valid": not trained_on,
        "overlap": count(trained_on),
        "rows": _rows(splits, bounds, seed),
        "generalization_gap": [
            {"split": split, **difference_interval(means["train"], means[split], seed).to_json()}
            for split in held_out_splits(evaluation)
            if "train" in splits
        ],
    }
    if "interventions" in evaluation:
        report["interventions"] = [
            {
                **part,
                "rows": _rows({f"{part['name']}, {split}": of for split, of in part["episodes"].items()}, bounds, seed),
                "differences": [
                    row
                    for split, of in part["episodes"].items()
                    for row in _differences(split, splits[split], of, seed)
                ],
            }
            for part in evaluation["interventions"]
        ]
    return report


def _rows(splits: Splits, bounds: Bounds, seed: int) -> list[dict[str, Any]]:
    """Return the table's rows: per split each game's and, of several games, before them that of all together."""
    rows = []
    for split, of_split in splits.items():
        for game, episodes in of_split.by_game().items():
            returns, solved, games = episodes.level_means(), episodes.solved(), episodes.games()
            # The mean over games of normalised means, as the ProcGen paper aggregates.
            known = games.keys() <= bounds.keys()
            scores = [normalise(of.level_means().mean(), bounds[name]) for name, of in games.items() if known]
            row = {
                "split": split,
                "game": game,
                "levels": len(returns),
                "return": mean_interval(returns, seed=seed).to_json(),
                "length": sum(episode.length for episode in episodes) / len(episodes),
                "solved": None if solved is None else mean_interval(solved, seed=seed).to_json(),
                "normalized": float(sum(scores) / len(scores)) if known else None,
            }
            rows.append(row)
    return rows


def normalise(returns: Any, bounds: tuple[float, float]) -> Any:
    """Return returns on the scale where the lower bound is 0 and the upper one 1."""
    return (returns - bounds[0]) / (bounds[1] - bounds[0])


def _differences(split: str, unchanged: Episodes, changed: Episodes, seed: int) -> list[dict[str, Any]]:
    """Return, for all games and for each, the unchanged agent minus the changed one, paired by level."""

    def difference(episodes: Episodes, field: str) -> dict[str, float | None]:
        games = [side.games() for side in (episodes, changed)]
        a, b = ([side[game].level_means(field) for game in games[0]] for side in games)
        return paired_difference(a, b, seed).to_json()

    games = unchanged.by_game()
    return [
        {
            "split": split,
            "game": game,
            "several": len(games) > 1,
            "levels": len(episodes.level_means()),
            "return": difference(episodes, "episode_return"),
            "solved": None if episodes.solved() is None else difference(episodes, "solved"),
        }
        for game, episodes in games.items()
    ]


class EpisodesFile(TypedDict):
    """Episodes in an evaluation's file."""

    episodes: Annotated[dict[str, Annotated[list[Episode], msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1)]


class InterventionFile(EpisodesFile):
    """An intervention in an evaluation's file, as far as it is read."""

    name: str


class _RequiredEntries(EpisodesFile):
    run: str
    env: str
    mode: str | None
    core: str
    actions: str
    repeats: int
    num_timesteps: int
    levels: dict[str, str]


class EvaluationFile(_RequiredEntries, total=False):
    """An evaluation's file, as far as it is read."""

    trained_on: TrainedOn
    same_first_frame: TrainedOn
    chosen: Score
    interventions: list[InterventionFile]


def read_evaluation(path: str, trained: TrainConfig) -> Evaluation:
    """Read a file of `srwm-rl eval --json` on a run with the settings `trained`.

    Raises:
        UserError: no such file, or one of another program.
    """
    try:
        file: Any = msgspec.json.decode(Path(path).read_bytes(), type=EvaluationFile)
        consistent = _is_consistent(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError, msgspec.MsgspecError):
        consistent = False
    if not consistent:
        raise UserError(f"{path} was not written by srwm-rl eval --json; give a file that was")
    evaluation: Evaluation = file
    for part in (evaluation, *evaluation.get("interventions", ())):
        part["episodes"] = {split: Episodes(rows) for split, rows in part["episodes"].items()}
    if "chosen" in evaluation:
        evaluation["chosen"] = msgspec.to_builtins(evaluation["chosen"])
    if "trained_on" not in evaluation:  # a file of an older version
        levels = {name: evaluation["episodes"][name].levels() for name in held_out_splits(evaluation)}
        evaluation["trained_on"] = levels_trained_on(trained, None, levels)
    return evaluation


def _is_consistent(file: EvaluationFile) -> bool:
    """Whether all splits are labelled and have the same games, and interventions the same levels as the agent."""

    def levels(rows: Sequence[Episode]) -> set[tuple[str, int]]:
        return {(episode.game, episode.level) for episode in rows}

    splits = file["episodes"]
    return (
        any(map(_is_held_out, splits))
        and all(name in file["levels"] or name.startswith("random, ") for name in splits)
        and len({frozenset(episode.game for episode in rows) for rows in splits.values()}) == 1
        and all(
            levels(splits.get(split, [])) == levels(rows)
            for part in file.get("interventions", [])
            for split, rows in part["episodes"].items()
        )
    )


def pool(evaluations: Sequence[Evaluation], trained: TrainConfig, seed: int) -> Evaluation:
    """Summarise the episodes of one run, or of several that differ in their seed alone, as one agent's."""
    first = evaluations[0]
    for other in evaluations:
        same = all(other[name] == first[name] for name in ("env", "mode", "core", "actions", "repeats", "levels"))
        if not same or other["episodes"].keys() != first["episodes"].keys():
            raise UserError("the evaluations of runs with the same settings differ in levels, repeats or actions")
    interventions = list(zip_longest(*(evaluation.get("interventions", ()) for evaluation in evaluations)))
    if any(None in parts or part["name"] != parts[0]["name"] for parts in interventions for part in parts):
        raise UserError("the evaluations of runs with the same settings differ in what was frozen")
    pooled = {
        "trained_on": merged(evaluation["trained_on"] for evaluation in evaluations),
        "episodes": _pooled(evaluations),
        "interventions": [{**parts[0], "episodes": _pooled(parts)} for parts in interventions],
    }
    return summarise(first | pooled, trained, seed)


def _pooled(parts: Sequence[dict[str, Any]]) -> Splits:
    return {
        split: Episodes(chain.from_iterable(part["episodes"].get(split, ()) for part in parts))
        for split in parts[0]["episodes"]
    }


def level_returns(evaluation: Evaluation, split: str) -> dict[str, tuple[list[int], FloatArray]]:
    """Return `game -> (levels, mean returns [n_levels])` of a split, by level."""
    games = evaluation["episodes"][split].games()
    return {game: (of.levels(), of.level_means()) for game, of in games.items()}


def held_out_splits(evaluation: Evaluation) -> list[str]:
    """Return the names of the held-out splits, in the order in which they were played."""
    return list(filter(_is_held_out, evaluation["episodes"]))


def _is_held_out(split: str) -> bool:
    return split == "held-out" or split.startswith("held-out ")
