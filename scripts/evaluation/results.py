"""The results of evaluations: summarised, read from files, pooled over runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np

from srwm_rl.agents.evaluation.play_levels import Episode, Episodes, Trial
from srwm_rl.agents.evaluation.statistics import FloatArray, difference_interval, mean_interval, paired_difference
from srwm_rl.envs.make import normalizer
from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_small
from srwm_rl.scripts.config.settings import TrainConfig, pairs
from srwm_rl.scripts.evaluation.few_shot_tables import AccuracyRow
from srwm_rl.scripts.evaluation.protocol import BEST_CONSTANT, TrainedOn, count, levels_trained_on, merged
from srwm_rl.storage.model_schema import Score, Steps

MAX_BYTES = 2**28
Evaluation = dict[str, Any]
"""What `srwm-rl eval --json` writes; see `EvaluationFile`."""
Splits = dict[str, Episodes]
Bounds = dict[str, tuple[float, float]]


def summarise(evaluation: Evaluation, trained: TrainConfig, seed: int) -> Evaluation:
    """Return an evaluation with what follows from its episodes: the numbers of the table, and whether it is valid."""
    splits, trained_on = evaluation["episodes"], evaluation["trained_on"]
    bounds = normalizer(trained.env, trained.mode, pairs(trained.env_kwargs, "env_kwargs"), trained.attempts)
    means = {split: episodes.level_means() for split, episodes in splits.items()}
    report = evaluation | {
        "valid": not trained_on,
        "overlap": count(trained_on),
        "rows": _rows(splits, bounds, seed),
        **_by_attempt(evaluation.get("trials", {}), seed),
        "generalization_gap": [
            {"split": split, **difference_interval(means["train"], means[split], seed).to_json()}
            for split in held_out_splits(evaluation)
            if "train" in splits
        ],
    }
    for key in ("interventions", "baselines"):
        if key not in evaluation:
            continue
        report[key] = [
            {
                **part,
                "rows": _rows({f"{part['name']}, {split}": of for split, of in part["episodes"].items()}, bounds, seed),
                **_by_attempt({f"{part['name']}, {split}": of for split, of in part.get("trials", {}).items()}, seed),
                "differences": [
                    row
                    for split, of in part["episodes"].items()
                    for row in _differences(split, splits[split], of, seed)
                ],
            }
            for part in evaluation[key]
        ]
    if evaluation.get("baselines") or any(split.startswith("random, ") for split in splits):
        report["not_above"] = _not_above(report, seed)
    return report


def _not_above(report: Evaluation, seed: int) -> list[dict[str, Any]]:
    """Return the paired differences of the agent from what it should exceed, where the interval is not above 0."""
    splits = report["episodes"]
    rows = [
        {"baseline": "random play", **row}
        for split in held_out_splits(report)
        if _same_levels(splits[split], splits.get(f"random, {split}", ()))
        for row in _differences(split, splits[split], splits[f"random, {split}"], seed)
    ]
    constant = [part for part in report.get("baselines", ()) if part["name"] == BEST_CONSTANT]
    rows += [{"baseline": part["name"], **row} for part in constant for row in part["differences"]]
    of_one_game = [row for row in rows if not (row["several"] and row["game"] == "all games")]
    return [row for row in of_one_game if row["return"]["low"] is None or row["return"]["low"] <= 0]


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


def trials_of(splits: Splits) -> dict[str, Any]:
    """Return the entry "trials" of an evaluation's file, `split -> trials`; none where no episode had attempts."""
    trials = {split: episodes.trials for split, episodes in splits.items() if episodes.trials}
    return {"trials": trials} if trials else {}


def _by_attempt(splits: dict[str, list[Trial]], seed: int) -> dict[str, Any]:
    """Return the entry "return_by_attempt": per split and game the return of each attempt, a mean over levels."""
    rows = []
    for split, trials in splits.items():
        for game in sorted({trial.game for trial in trials}):
            returns = attempt_returns([trial for trial in trials if trial.game == game])
            means = [mean_interval(column[~np.isnan(column)], seed=seed).to_json() for column in returns.T]
            rows.append({"split": split, "game": game, "levels": len(returns), "return": means})
    return {"return_by_attempt": rows} if rows else {}


def attempt_returns(trials: Sequence[Trial]) -> FloatArray:
    """Return the returns per level and attempt, `[n_levels, n_attempts]`, each the mean over the level's trials.

    Where no trial of a level has so many attempts, it is NaN.
    """
    levels = sorted({trial.level for trial in trials})
    sums, counts = np.zeros((2, len(levels), max(len(trial.returns) for trial in trials)))
    for trial in trials:
        row, played = levels.index(trial.level), slice(len(trial.returns))
        sums[row, played] += trial.returns
        counts[row, played] += 1
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def normalise(returns: Any, bounds: tuple[float, float]) -> Any:
    """Return returns on the scale where the lower bound is 0 and the upper one 1."""
    return (returns - bounds[0]) / (bounds[1] - bounds[0])


def _differences(split: str, unchanged: Episodes, changed: Episodes, seed: int) -> list[dict[str, Any]]:
    """Return, for all games and for each, the unchanged agent minus the changed one, paired by level."""

    def difference(episodes: Episodes, field: str) -> dict[str, float | None]:
        games = [side.games() for side in (episodes, changed)]
        a, b = ([side[game].level_means(field) for game in games[0]] for side in games)
        return paired_difference(a, b, seed).to_json()

    games, has_solved = unchanged.by_game(), unchanged.solved() is not None and changed.solved() is not None
    return [
        {
            "split": split,
            "game": game,
            "several": len(games) > 1,
            "levels": len(episodes.level_means()),
            "return": difference(episodes, "episode_return"),
            "solved": difference(episodes, "solved") if has_solved else None,
        }
        for game, episodes in games.items()
    ]


class TrialsFile(TypedDict, total=False):
    """Trials in an evaluation's file."""

    trials: dict[str, Annotated[list[Trial], msgspec.Meta(min_length=1)]]


class EpisodesFile(TrialsFile):
    """Episodes in an evaluation's file."""

    episodes: Annotated[dict[str, Annotated[list[Episode], msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1)]


class InterventionFile(EpisodesFile):
    """An intervention in an evaluation's file, as far as it is read."""

    name: str


class _BaselineDescription(TypedDict, total=False):
    action: dict[str, str]
    tried: str
    chosen_on: str
    agent: str


class BaselineFile(InterventionFile, _BaselineDescription):
    """A baseline in an evaluation's file; the best constant action and agents of --beside are described further."""


class _RequiredEntries(EpisodesFile):
    run: str
    env: str
    mode: str | None
    core: str
    actions: str
    repeats: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    num_timesteps: Steps
    levels: dict[str, str]


class EvaluationFile(_RequiredEntries, total=False):
    """An evaluation's file, as far as it is read."""

    trained_on: TrainedOn
    same_first_frame: TrainedOn
    chosen: Score
    interventions: list[InterventionFile]
    baselines: list[BaselineFile]
    few_shot: list[AccuracyRow]


def read_evaluation(path: str, trained: TrainConfig) -> Evaluation:
    """Read a file of `srwm-rl eval --json` on a run with the settings `trained`.

    Raises:
        UserError: no such file, or one of another program.
    """
    try:
        file: Any = msgspec.json.decode(read_small(Path(path), MAX_BYTES), type=EvaluationFile)
        consistent = _is_consistent(file)
    except UserError:
        raise
    except (ValueError, RecursionError, msgspec.MsgspecError):
        consistent = False
    if not consistent:
        raise UserError(f"{path} was not written by srwm-rl eval --json; give a file that was")
    evaluation: Evaluation = file
    for part in (evaluation, *evaluation.get("interventions", ()), *evaluation.get("baselines", ())):
        part["episodes"] = {split: Episodes(rows) for split, rows in part["episodes"].items()}
    if "chosen" in evaluation:
        evaluation["chosen"] = msgspec.to_builtins(evaluation["chosen"])
    if "trained_on" not in evaluation:  # a file of an older version
        levels = {name: evaluation["episodes"][name].levels() for name in held_out_splits(evaluation)}
        evaluation["trained_on"] = levels_trained_on(trained, None, levels)
    return evaluation


def _is_consistent(file: EvaluationFile) -> bool:
    """Whether all splits are labelled and have the same games, and what is compared the same levels as the agent."""
    splits = file["episodes"]
    return (
        any(map(_is_held_out, splits))
        and all(name in file["levels"] or name.startswith("random, ") for name in splits)
        and len({frozenset(episode.game for episode in rows) for rows in splits.values()}) == 1
        and all(
            _same_levels(splits.get(split, []), rows)
            for part in (*file.get("interventions", []), *file.get("baselines", []))
            for split, rows in part["episodes"].items()
        )
    )


def _same_levels(first: Sequence[Episode], second: Sequence[Episode]) -> bool:
    a, b = ({(episode.game, episode.level) for episode in rows} for rows in (first, second))
    return a == b


def pool(evaluations: Sequence[Evaluation], trained: TrainConfig, seed: int) -> Evaluation:
    """Summarise the episodes of one run, or of several that differ in their seed alone, as one agent's."""
    first = evaluations[0]
    for other in evaluations:
        same = all(other[name] == first[name] for name in ("env", "mode", "core", "actions", "repeats", "levels"))
        if not same or other["episodes"].keys() != first["episodes"].keys():
            raise UserError("the evaluations of runs with the same settings differ in levels, repeats or actions")
    interventions = _matching(evaluations, "interventions", "what was frozen")
    baselines = _matching(evaluations, "baselines", "their baselines")
    pooled = {
        "trained_on": merged(evaluation["trained_on"] for evaluation in evaluations),
        **_pooled(evaluations),
        "interventions": [{**parts[0], **_pooled(parts)} for parts in interventions],
        "baselines": [{**parts[0], **_pooled(parts)} for parts in baselines],
    }
    return summarise(first | pooled, trained, seed)


def _matching(evaluations: Sequence[Evaluation], key: str, what: str) -> list[tuple[dict[str, Any], ...]]:
    """Return for each intervention or baseline what every evaluation has of it."""
    matching = list(zip_longest(*(evaluation.get(key, ()) for evaluation in evaluations)))
    if any(None in parts or part["name"] != parts[0]["name"] for parts in matching for part in parts):
        raise UserError(f"the evaluations of runs with the same settings differ in {what}")
    return matching


def _pooled(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the episodes of all parts by split, and the trials where there are any."""

    def rows(key: str) -> dict[str, list[Any]]:
        splits = parts[0].get(key, {})
        return {split: list(chain.from_iterable(part[key].get(split, ()) for part in parts)) for split in splits}

    trials = rows("trials")
    episodes = {split: Episodes(of) for split, of in rows("episodes").items()}
    return {"episodes": episodes, **({"trials": trials} if trials else {})}


def level_returns(evaluation: Evaluation, split: str) -> dict[str, tuple[list[int], FloatArray]]:
    """Return `game -> (levels, mean returns [n_levels])` of a split, by level."""
    games = evaluation["episodes"][split].games()
    return {game: (of.levels(), of.level_means()) for game, of in games.items()}


def held_out_splits(evaluation: Evaluation) -> list[str]:
    """Return the names of the held-out splits, in the order in which they were played."""
    return list(filter(_is_held_out, evaluation["episodes"]))


def _is_held_out(split: str) -> bool:
    return split == "held-out" or split.startswith("held-out ")
